"""Flamingo (Alayrac et al. 2022) around public parts: four sets of data accumulated into each update.

    python train.py --config=configs/flamingo.py:3b --workdir=runs/flamingo-3b \\
        --config.data.source.train=m3w/train.jsonl --config.data.source.eval=m3w/held_out.jsonl \\
        --config.accumulated.align.data.source.train='align/{00000..09999}.tar' \\
        --config.accumulated.ltip.data.source.train='ltip/{00000..09999}.tar' \\
        --config.accumulated.vtp.data.source.train=vtp/train.jsonl

`:3b` or `:9b`. The paper's data and parts are not public; the frozen parts are CLIP ViT-L/14 (its table 10: 64.9 instead of
70.7 with M3W and LAION-400M in the place of its pairs) and MPT of the same layers, width and heads. M3W is interleaved records
or OBELICS' documents, the pairs are tar shards, VTP is films with their captions (`vlm_jax/data/sources/`).

`:3b-published`, `:9b-published` and `:80b-published` have the paper's own parts, NFNet-F6 at 320 pixels and a Chinchilla, with
random numbers and a tokenizer that is trained on the data: to count, to plan (`python -m vlm_jax.plan`), or to start from parts
of your own, `--config.init_parts`.

Published: AdamW, 1e-4 after 5,000 steps of linear warm-up, then constant, 500,000 steps; decay 0.1, none on the resampler;
gradient norm 1; loss weights 1.0, 0.2, 0.2, 0.03; 256 tokens and 5 pictures of a page, p_next 1/2; a space before half of the
paired texts; films of 8 frames, one a second. The batch is that of its ablations, 256, 512, 512 and 64 (a final run's is not
published), pairs packed eight and films four to a row. `--config.sets=round_robin` is its table 3 (ii).

Otherwise here: pictures of 224 pixels (CLIP's; 320 in the paper) with public parts, and of a page the first 256 tokens.
"""

import dataclasses

import ml_collections

from vlm_jax.config import (
    AugmentConfig,
    DataConfig,
    JsonLinesConfig,
    OptimizerConfig,
    ParamRule,
    PartInit,
    RunConfig,
    SetConfig,
    TarConfig,
)
from vlm_jax.config_dict import to_config_dict
from vlm_jax.models.systems import system

CLIP = "openai/clip-vit-large-patch14"
TEXT = {"3b": "mosaicml/mpt-1b-redpajama-200b", "9b": "mosaicml/mpt-7b"}
SIZES = (*TEXT, "3b-published", "9b-published", "80b-published")
KNOWN = 50_277  # tokens of MPT's tokenizer; <image> and <EOC> take the next rows of its embedding


def recipe(size: str) -> RunConfig:
    if size not in SIZES:
        raise ValueError(f"name a size behind a colon: --config=configs/flamingo.py:3b; there are {', '.join(SIZES)}")
    model, text = system(f"flamingo-{size}"), TEXT.get(size)
    parts = (PartInit(part="vision", checkpoint=CLIP), PartInit(part="language", checkpoint=text)) if text else ()
    pages = DataConfig(
        source=JsonLinesConfig(train="", eval="", bad_lines="skip"),
        tokenizer=text or "train",
        vocab_size=model.language.vocab_size,
        prompt="{question}",
        answer="{answer}",
        image_size=model.vision.image_size,
        image_fit="pad",
        rows=256,
        tokens=256,
        images=5,
        next_image=0.5,
        too_long="truncate",
        augment=AugmentConfig(mirror=True, colour=0.1),
    )
    pairs = dataclasses.replace(
        pages,
        source=TarConfig(train="", eval="", bad_lines="skip"),
        rows=64,
        images=8,
        next_image=0.0,
        leading_space=0.5,
    )
    films = dataclasses.replace(pairs, source=pages.source, rows=16, images=4, frames=8)
    optimizer = OptimizerConfig(
        lr=1e-4,
        warmup_steps=5000,
        schedule="constant",
        weight_decay=0.1,
        clip_norm=1.0,
        rules=(
            ParamRule(pattern="^vision", frozen=True, frozen_dtype="bfloat16"),
            ParamRule(pattern="^connector", decay=0.0),
            ParamRule(pattern="^language/embedding", rows_from=KNOWN if text else model.language.vocab_size - 2),
            ParamRule(pattern="^language", frozen=True, frozen_dtype="bfloat16"),
        ),
    )
    return RunConfig(
        model=model,
        data=pages,
        accumulated=(
            SetConfig(name="align", data=pairs, weight=0.2, evaluate=False),
            SetConfig(name="ltip", data=pairs, weight=0.2, evaluate=False),
            SetConfig(name="vtp", data=films, weight=0.03, evaluate=False),
        ),
        optimizer=optimizer,
        steps=500_000,
        dtype="bfloat16",
        remat="full",
        init_parts=parts,
    )


def get_config(size: str = "3b") -> ml_collections.ConfigDict:
    return to_config_dict(recipe(size))
