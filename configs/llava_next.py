"""LLaVA-NeXT (Liu et al. 2024, LLaVA-VL/LLaVA-NeXT `scripts/train/direct_finetune_clip.sh`): everything learns, from tiles.

    python train.py --config=configs/llava_next.py:7b --workdir=runs/llava-next \\
        --config.data.source.train=llava_next.json --config.data.source.eval=held_out.json

`:7b` or `:13b`, around Vicuna. The projector is that of `runs/llava15-stage1` (`llava15_stage1.py`, at 1e-3), CLIP and Vicuna
are the published ones; `--config.init_from=llava-hf/llava-v1.6-vicuna-7b-hf --config.init_parts=()` goes on with the finished
model. A picture is a small copy of itself and up to four tiles of 336 pixels, with a newline token after every row of patches.

Published: one epoch, rate 1e-5 and 2e-6 for the vision tower, cosine after 3 % of warm-up, no decay, at most 32,768 tokens, the
pinpoints of the checkpoint's own processor. Not published in that script: the number of conversations (the released data have
about 779,000) and of an update (128, as LLaVA-1.5). Rows are packed: one of 32,768 tokens holds about twelve conversations of a
picture each, so that 8 rows are about 100. The loss is the mean over all tokens of an update.
"""

import ml_collections

from configs.llava15_stage1 import CLIP
from vlm_jax.config import DataConfig, JsonLinesConfig, OptimizerConfig, ParamRule, PartInit, RunConfig
from vlm_jax.config_dict import to_config_dict
from vlm_jax.models.systems import system

CONVERSATIONS = 779_000
# The system, its language model, and the checkpoint whose tokenizer and picture processor are used.
SIZES = {
    "7b": ("llava-next-vicuna-7b", "lmsys/vicuna-7b-v1.5", "llava-hf/llava-v1.6-vicuna-7b-hf"),
    "13b": ("llava-next-vicuna-13b", "lmsys/vicuna-13b-v1.5", "llava-hf/llava-v1.6-vicuna-13b-hf"),
}


def get_config(size: str = "7b") -> ml_collections.ConfigDict:
    if size not in SIZES:
        raise ValueError(f"name a size behind a colon: --config=configs/llava_next.py:7b; there are {', '.join(SIZES)}")
    name, text, processor = SIZES[size]
    model, steps = system(name), CONVERSATIONS // 128
    data = DataConfig(
        source=JsonLinesConfig(train="", eval=""),
        processor=processor,
        template="vicuna_v1",
        too_long="drop_turns",
        image_size=336,
        rows=8,
        tokens=32_768,
        images=64,
        visual_tokens=model.visual_tokens_in_sequence,
    )
    run = RunConfig(
        model=model,
        data=data,
        optimizer=OptimizerConfig(
            lr=1e-5,
            warmup_steps=round(0.03 * steps),
            weight_decay=0.0,
            rules=(ParamRule(pattern="^vision", lr=0.2),),
        ),
        steps=steps,
        remat="full",
        init_parts=(
            PartInit(part="vision", checkpoint=CLIP),
            PartInit(part="connector", checkpoint="runs/llava15-stage1"),
            PartInit(part="language", checkpoint=text),
        ),
    )
    return to_config_dict(run)
