"""LLaVA-1.5, stage 2 (Liu et al. 2023, `scripts/v1_5/finetune.sh`): the projector and the language model follow instructions.

    python train.py --config=configs/llava15_stage2.py:7b --workdir=runs/llava15 --config.init_from=runs/llava15-stage1 \\
        --config.data.source.train=llava_v1_5_mix665k.json --config.data.source.eval=held_out.json

`:7b`, `:13b`, `:bakllava-7b` or `:sharegpt4v-7b` as in `llava15_stage1.py`, whose run `init_from` names. With
`:7b,without_stage1` the parts start apart, the projector untrained.

With `:7b,lora` (`scripts/v1_5/finetune_lora.sh`; also `:13b,lora`) the language model is frozen, in bfloat16, with adapters
beside every linear map but the head: rank 128, alpha 256, dropout 0.05, at 2e-4; the projector is trained at 2e-5.
`:7b,qlora` holds that frozen language model in int8. `vlm_jax.load("runs/llava15", merge_adapters=True)` answers with it.

Published: one epoch of 665,298 conversations, 128 an update, rate 2e-5, cosine after 3 % of warm-up, no decay, at most 2,048
tokens, pictures padded to squares, the template `vicuna_v1`, conversations of one modality and like length together. Packing
takes the place of that grouping: a row of 2,048 tokens holds about two conversations, so that 64 rows are about 128 of them,
with pictures and without. The loss is the mean over all tokens of an update.
"""

import dataclasses

import ml_collections

from configs.llava15_stage1 import CLIP, SIZES, UPPER_HALF
from vlm_jax.config import DataConfig, JsonLinesConfig, LoraConfig, OptimizerConfig, ParamRule, PartInit, RunConfig
from vlm_jax.config_dict import to_config_dict
from vlm_jax.models.systems import system

CONVERSATIONS = 665_298
FROZEN = (ParamRule(pattern="^vision", frozen=True, frozen_dtype="bfloat16"),)
ADAPTERS = (LoraConfig(pattern="^language/layers/", rank=128, alpha=256.0, dropout=0.05),)
BESIDE_ADAPTERS = {
    "lora": (ParamRule(pattern="^language", frozen=True, frozen_dtype="bfloat16"),),
    "qlora": (
        ParamRule(pattern="^language/lm_head", frozen=True, frozen_dtype="bfloat16"),
        ParamRule(pattern="^language", frozen=True, frozen_dtype="int8"),
    ),
}
OPTIONS = ("without_stage1", *BESIDE_ADAPTERS)


def get_config(choice: str = "7b") -> ml_collections.ConfigDict:
    size, *options = choice.split(",")
    if size not in SIZES or not set(options) <= set(OPTIONS):
        raise ValueError(
            f"name a size behind a colon: --config=configs/llava15_stage2.py:7b; there are {', '.join(SIZES)}, and behind a "
            f"comma {', '.join(OPTIONS)}"
        )
    frozen = [option for option in options if option in BESIDE_ADAPTERS]
    if len(frozen) > 1 or (frozen and size == "sharegpt4v-7b"):
        raise ValueError(f"{choice}: lora or qlora, and not with sharegpt4v-7b, which trains the vision encoder too")
    name, text, processor = SIZES[size]
    parts = (PartInit(part="vision", checkpoint=CLIP), PartInit(part="language", checkpoint=text))
    model = system(name)
    steps = CONVERSATIONS // 128
    data = DataConfig(
        source=JsonLinesConfig(train="", eval=""),
        processor=processor,
        template="vicuna_v1",
        pad_to_square=True,
        too_long="drop_turns",
        image_size=336,
        rows=64,
        tokens=2048,
        images=4,
        visual_tokens=model.visual_tokens_in_sequence,
    )
    optimizer = OptimizerConfig(
        lr=2e-4 if frozen else 2e-5,
        warmup_steps=round(0.03 * steps),
        weight_decay=0.0,
        rules=UPPER_HALF if size == "sharegpt4v-7b" else FROZEN,
    )
    if frozen:
        trained = (ParamRule(pattern="/lora/"), ParamRule(pattern="^connector", lr=0.1))
        optimizer = dataclasses.replace(optimizer, rules=(*trained, *BESIDE_ADAPTERS[frozen[0]], *FROZEN))
    apart = "without_stage1" in options
    run = RunConfig(
        model=model,
        data=data,
        optimizer=optimizer,
        steps=steps,
        remat="full",
        adapters=ADAPTERS if frozen else (),
        init_from="" if apart else "runs/llava15-stage1",
        init_parts=parts if apart else (),
    )
    return to_config_dict(run)
