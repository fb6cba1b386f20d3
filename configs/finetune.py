"""A published checkpoint (LLaVA-1.5, BakLLaVA, ViP-LLaVA, LLaVA-NeXT, IDEFICS, IDEFICS2, OpenFlamingo, PaliGemma, or a
language model alone) trained further on data of your own, and written back for PyTorch.

    python train.py --config=configs/finetune.py:llava-hf/llava-1.5-7b-hf --workdir=runs/tuned \\
        --config.data.source.train=mine/train.jsonl --config.data.source.eval=mine/eval.jsonl
    python -c "import vlm_jax; vlm_jax.export('runs/tuned', 'tuned')"

After the colon comes a folder saved by transformers, or the name of a hub repository. The vision encoder stays frozen. The
data's formats are those of `vlm_jax/data/sources/jsonl.py`.

Conversations are written as the checkpoint's own chat template has them, or as a template named by `--config.data.template`
(which is then exported too), and images are prepared by its own processor: training and inference use the same prompts.
`python -m vlm_jax.show` prints an example as the model reads it. Weights in PyTorch pickles need `--config.pickles=True`.
"""

from pathlib import Path

import ml_collections

from vlm_jax.api import open_checkpoint
from vlm_jax.config import (
    DataConfig,
    JsonLinesConfig,
    OptimizerConfig,
    ParamRule,
    RunConfig,
)
from vlm_jax.config_dict import to_config_dict


def get_config(checkpoint: str = "") -> ml_collections.ConfigDict:
    if not checkpoint:
        raise ValueError("name a checkpoint behind a colon: --config=configs/finetune.py:llava-hf/llava-1.5-7b-hf")
    # Of weights that are here, only the names and sizes are read; pickles of a hub repository are not fetched for that.
    found = open_checkpoint(checkpoint, pickles=Path(checkpoint).expanduser().exists())
    model = found.config
    if not found.processor.answers:
        raise ValueError(f"{checkpoint} is an encoder: it answers nothing, so it cannot be trained with this recipe")
    data = DataConfig(
        source=JsonLinesConfig(train="", eval=""),
        processor=checkpoint,
        image_size=found.processor.media.side if model.vision else 1,
        keep_shapes=model.reads_shapes,
        rows=8,
        tokens=min(2048, model.language.max_positions or 2048),
        images=10 if model.vision else 1,
        visual_tokens=model.visual_tokens_in_sequence,
    )
    optimizer = OptimizerConfig(
        lr=2e-5,
        warmup_steps=100,
        schedule="cosine",
        weight_decay=0.0,
        rules=(ParamRule(pattern="^vision", frozen=True, frozen_dtype="bfloat16"),),
    )
    run = RunConfig(model=model, data=data, optimizer=optimizer, steps=1000, remat="full", save_every=200, init_from=checkpoint)
    return to_config_dict(run)
