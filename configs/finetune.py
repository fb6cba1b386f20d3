"""Any published checkpoint that answers about pictures, trained further on data of your own and written back for PyTorch.

    python train.py --config=configs/finetune.py:llava-hf/llava-1.5-7b-hf --workdir=runs/tuned \
        --config.data.source.train=mine/train.jsonl --config.data.source.eval=mine/eval.jsonl
    python -c "import vlm_jax; vlm_jax.export('runs/tuned', 'tuned')"

Behind the colon stands a folder that transformers saved, or the name of a hub repository. The vision encoder stays frozen. The
data's formats are those of `vlm_jax/data/jsonl.py`.
"""

import ml_collections

from vlm_jax.api import open_checkpoint
from vlm_jax.config import DataConfig, InSequenceConfig, JsonLinesConfig, ModelConfig, OptimizerConfig, ParamRule, RunConfig
from vlm_jax.config_dict import to_config_dict


def get_config(checkpoint: str = "") -> ml_collections.ConfigDict:
    if not checkpoint:
        raise ValueError("name a checkpoint behind a colon: --config=configs/finetune.py:llava-hf/llava-1.5-7b-hf")
    found = open_checkpoint(checkpoint)
    model = found.config
    if not isinstance(model, ModelConfig) or model.vision is None:
        raise ValueError(f"{checkpoint} does not answer about pictures, so it cannot be trained with this recipe")
    in_sequence = isinstance(model.fusion, InSequenceConfig)
    data = DataConfig(
        source=JsonLinesConfig(train="", eval=""),
        tokenizer=checkpoint,
        end=found.processor.tokenizer.wrapped.eos_token,
        prompt="USER: {question} ASSISTANT:",
        answer=" {answer}",
        image_size=model.vision.image_size,
        image_fit="crop",
        rows=8,
        tokens=2048,
        images=4,
        visual_tokens=model.visual_tokens(1) if in_sequence else 0,
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
