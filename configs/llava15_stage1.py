"""LLaVA-1.5, stage 1 (Liu et al. 2023, `scripts/v1_5/pretrain.sh`): the projector alone learns to caption.

    python train.py --config=configs/llava15_stage1.py:7b --workdir=runs/llava15-stage1 \\
        --config.data.source.train=blip_laion_cc_sbu_558k.json --config.data.source.eval=held_out.json

`:7b`, `:13b`, `:bakllava-7b` (LLaVA-1.5's recipe around Mistral) or `:sharegpt4v-7b` (Chen et al. 2023: 1.2 million captions;
the language model and the upper half of the vision encoder learn too, at 2e-5). The data are LCS-558K as published, with the
pictures beside the file. Stage 2 follows in `llava15_stage2.py`.

Published: one epoch of 558,128 captions, 256 an update, rate 1e-3, cosine after 3 % of warm-up, no decay, at most 2,048 tokens,
pictures cropped to squares, the template `plain`. Captions are packed here, about three to a row of 2,048 tokens, so that 80
rows are about 256 captions; the loss is the mean over all tokens of an update.
"""

import ml_collections

from vlm_jax.config import DataConfig, JsonLinesConfig, OptimizerConfig, ParamRule, PartInit, RunConfig
from vlm_jax.config_dict import to_config_dict
from vlm_jax.models.systems import system

CLIP = "openai/clip-vit-large-patch14-336"
# The system, its language model, and the checkpoint whose tokenizer and picture processor are used.
SIZES = {
    "7b": ("llava-1.5-7b", "lmsys/vicuna-7b-v1.5", "llava-hf/llava-1.5-7b-hf"),
    "13b": ("llava-1.5-13b", "lmsys/vicuna-13b-v1.5", "llava-hf/llava-1.5-13b-hf"),
    "bakllava-7b": ("bakllava-7b", "mistralai/Mistral-7B-v0.1", "llava-hf/bakLlava-v1-hf"),
    "sharegpt4v-7b": ("llava-1.5-7b", "lmsys/vicuna-7b-v1.5", "llava-hf/llava-1.5-7b-hf"),
}
CAPTIONS = {"sharegpt4v-7b": 1_246_000}  # of LCS-558K otherwise
FROZEN = (
    ParamRule(pattern="^vision", frozen=True, frozen_dtype="bfloat16"),
    ParamRule(pattern="^language", frozen=True, frozen_dtype="bfloat16"),
)
UPPER_HALF = (  # of CLIP's 24 layers
    ParamRule(pattern="^vision/layers", rows_from=12),
    ParamRule(pattern="^vision", frozen=True, frozen_dtype="bfloat16"),
)


def get_config(size: str = "7b") -> ml_collections.ConfigDict:
    if size not in SIZES:
        raise ValueError(f"name a size behind a colon: --config=configs/llava15_stage1.py:7b; there are {', '.join(SIZES)}")
    name, text, processor = SIZES[size]
    model, more = system(name), size == "sharegpt4v-7b"
    steps = CAPTIONS.get(size, 558_128) // 256
    data = DataConfig(
        source=JsonLinesConfig(train="", eval=""),
        processor=processor,
        template="plain",
        image_size=336,
        rows=80,
        tokens=2048,
        images=4,
        visual_tokens=model.visual_tokens_in_sequence,
    )
    optimizer = OptimizerConfig(
        lr=2e-5 if more else 1e-3,
        warmup_steps=round(0.03 * steps),
        weight_decay=0.0,
        rules=UPPER_HALF if more else FROZEN,
    )
    run = RunConfig(
        model=model,
        data=data,
        optimizer=optimizer,
        steps=steps,
        remat="full",
        init_parts=(PartInit(part="vision", checkpoint=CLIP), PartInit(part="language", checkpoint=text)),
    )
    return to_config_dict(run)
