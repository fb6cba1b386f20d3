"""A tiny run of two towers: pairs of pictures and captions, and its configuration; also a recipe for `train.py --config`."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import ml_collections
from folders import picture

from tests.tiny import tiny_model
from vlm_jax.config import (
    ContrastiveConfig,
    DataConfig,
    DualEncoderConfig,
    ImageTowerConfig,
    JsonLinesConfig,
    LearnedPositionsConfig,
    OptimizerConfig,
    RunConfig,
    TextTowerConfig,
)
from vlm_jax.config_dict import to_config_dict
from vlm_jax.interop.published import open_published

CAPTIONS = ["a photo of a cat", "a dog", "it is red", "a red bicycle .", "photo of a dog .", "a cat"]


def write_pairs(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for number, caption in enumerate(CAPTIONS):
        picture(number, 20 + number, 30 - 2 * number).save(folder / f"{number}.png")
        turns = [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": caption}]
        lines.append(json.dumps({"id": str(number), "image": f"{number}.png", "conversations": turns}))
    path = folder / "data.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return path


def pair_run(folder: Path, published: Path, *, rows: int, **changes: Any) -> RunConfig:
    """A run that starts from a published CLIP or SigLIP."""
    data = str(write_pairs(folder / "data"))
    settings = dict(
        model=open_published(published).config,
        data=DataConfig(
            source=JsonLinesConfig(train=data, eval=data),
            layout="pair",
            processor=str(published),
            image_size=16,
            rows=rows,
            tokens=12,
            images=1,
            cache_dir=str(folder / "cache"),
            workers=0,
        ),
        objective=ContrastiveConfig(),
        optimizer=OptimizerConfig(lr=1e-3, warmup_steps=1),
        init_from=str(published),
        steps=4,
        dtype="float32",
        log_every=1,
        eval_every=4,
        save_every=2,
    )
    return RunConfig(**settings | changes)


def tiny_towers() -> DualEncoderConfig:
    """Random towers of a few thousand parameters."""
    tiny = tiny_model()
    language = dataclasses.replace(tiny.language, positions=LearnedPositionsConfig(), max_positions=16)
    return DualEncoderConfig(
        image=ImageTowerConfig(encoder=tiny.vision, pool="mean", projection=8),
        text=TextTowerConfig(encoder=language, causal=True, pool="end_token", end_token=2, projection=8, projection_bias=False),
        loss="softmax",
        logit_scale=2.6,
    )


def get_config() -> ml_collections.ConfigDict:
    data = DataConfig(
        source=JsonLinesConfig(train="", eval=""),
        layout="pair",
        vocab_size=300,
        image_size=16,
        rows=16,
        tokens=16,
        images=1,
        workers=0,
        too_long="truncate",
    )
    run = RunConfig(
        model=tiny_towers(),
        data=data,
        objective=ContrastiveConfig(max_scale=10.0, exchange="ring", mask_duplicates=True),
        optimizer=OptimizerConfig(lr=3e-3, warmup_steps=2, accumulate=2),
        steps=8,
        dtype="float32",
        log_every=1,
        eval_every=4,
        save_every=2,
    )
    return to_config_dict(run)
