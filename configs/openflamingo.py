"""OpenFlamingo (Awadalla et al. 2023; `open_flamingo/train/train.py`): MMC4 and LAION-2B accumulated into each update.

    python train.py --config=configs/openflamingo.py:3b --workdir=runs/openflamingo-3b \\
        --config.data.source.train='mmc4/{000000000..000000999}.tar' --config.data.source.eval=mmc4/held_out.tar \\
        --config.accumulated.laion.data.source.train='laion/{00000..09999}.tar'

`:3b`, `:4b` or `:9b`: CLIP ViT-L/14 with MPT-1B, RedPajama-3B or MPT-7B, a gated layer before every, every second or every
fourth layer. MMC4's documents are read as published, from tar shards or, with `--config.data.source.kind=jsonl`, from JSON
lines: a picture stands before the sentence it is assigned to, from a similarity of 0.24 on (`vlm_jax/data/documents.py`).

Published: AdamW, 1e-4 after 1,875 steps of warm-up (the README's example), then constant; decay 0.1 on the gated layers alone;
gradient norm 1; float32; loss weights MMC4 1.0, LAION 0.2; 32 and 64 sequences a GPU on 64 GPUs; 256 tokens and at most 6
pictures of a document, 480 times 125,000 documents; pictures mirrored half of the time. Nothing is learned of a document before
its first picture and between the end of a chunk and the next picture; of a pair all but `<image>`.

Otherwise here: pairs are packed eight to a row and not cut to 32 tokens, documents of one picture are all kept, and `<EOC>` is
OpenFlamingo's `<|endofchunk|>`.
"""

import dataclasses

import ml_collections

from vlm_jax.config import (
    AugmentConfig,
    DataConfig,
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
SIZES = {
    "3b": "mosaicml/mpt-1b-redpajama-200b",
    "4b": "togethercomputer/RedPajama-INCITE-Base-3B-v1",
    "9b": "mosaicml/mpt-7b",
}
KNOWN = 50_277  # tokens of the three language models' tokenizer; the new ones take the next rows of the embedding
DOCUMENTS, GPUS = 480 * 125_000, 64


def get_config(size: str = "3b") -> ml_collections.ConfigDict:
    if size not in SIZES:
        raise ValueError(f"name a size behind a colon: --config=configs/openflamingo.py:3b; there are {', '.join(SIZES)}")
    text = SIZES[size]
    documents = DataConfig(
        source=TarConfig(train="", eval="", bad_lines="skip"),
        tokenizer=text,
        end="<|endofchunk|>",
        prompt="{question}",
        answer="{answer}",
        image_size=224,
        image_fit="crop",
        rows=32 * GPUS,
        tokens=256,
        images=6,
        learned="after_image",
        too_long="truncate",
        augment=AugmentConfig(mirror=True),
    )
    pairs = dataclasses.replace(documents, rows=64 * GPUS // 8, images=8, learned="all")
    optimizer = OptimizerConfig(
        lr=1e-4,
        warmup_steps=1875,
        schedule="constant",
        weight_decay=0.1,
        clip_norm=1.0,
        rules=(
            ParamRule(pattern="^vision", frozen=True),
            ParamRule(pattern="^connector", decay=0.0),
            ParamRule(pattern="^language/embedding", rows_from=KNOWN, decay=0.0),
            ParamRule(pattern="^language", frozen=True),
        ),
    )
    run = RunConfig(
        model=system(f"openflamingo-{size}"),
        data=documents,
        accumulated=(SetConfig(name="laion", data=pairs, weight=0.2, evaluate=False),),
        optimizer=optimizer,
        steps=DOCUMENTS // documents.rows,
        dtype="float32",
        remat="full",
        init_parts=(PartInit(part="vision", checkpoint=CLIP), PartInit(part="language", checkpoint=text)),
    )
    return to_config_dict(run)
