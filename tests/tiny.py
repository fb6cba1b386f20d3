"""A model of a few thousand parameters with every part in it, and data for it; also a recipe for `train.py --config`."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import ml_collections
import numpy as np
import pytest
from PIL import Image

from vlm_jax.batch import Batch
from vlm_jax.config import (
    BlockConfig,
    DataConfig,
    DecoderConfig,
    GatedCrossAttentionConfig,
    JsonLinesConfig,
    MeshConfig,
    ModelConfig,
    NormConfig,
    OptimizerConfig,
    PerceiverConfig,
    RopeConfig,
    RunConfig,
    VitConfig,
)
from vlm_jax.config_dict import to_config_dict
from vlm_jax.ops.token_scores import scores_of
from vlm_jax.sharding import Named, make_mesh
from vlm_jax.training.objectives.next_token import sums_of
from vlm_jax.training.step import Trainer, TrainState

VOCAB = 320


def tiny_model() -> ModelConfig:
    """Eight heads, so that `tensor=8` shards them; four key/value heads, which it cannot."""
    vision = BlockConfig(
        width=16,
        heads=2,
        kv_heads=2,
        head_width=8,
        mlp_width=32,
        activation="quick_gelu",
        gated_mlp=False,
        norm=NormConfig(kind="layer", eps=1e-5),
        qkv_bias=True,
        out_bias=True,
        mlp_bias=True,
    )
    language = BlockConfig(
        width=32,
        heads=8,
        kv_heads=4,
        head_width=4,
        mlp_width=48,
        activation="silu",
        gated_mlp=True,
        norm=NormConfig(kind="rms", eps=1e-5),
        qkv_bias=False,
        out_bias=False,
        mlp_bias=False,
    )
    return ModelConfig(
        vision=VitConfig(image_size=16, patch_size=8, layers=2, block=vision),
        connector=PerceiverConfig(latents=4, layers=1, heads=2, head_width=8),
        fusion=GatedCrossAttentionConfig(every=2, offset=0, heads=8, head_width=4, mlp_width=64),
        language=DecoderConfig(
            vocab_size=VOCAB,
            layers=3,
            block=language,
            positions=RopeConfig(base=10_000.0, scaling=None),
            max_positions=256,
            window=None,
            tied_head=True,
        ),
    )


def tiny_run(**changes: Any) -> RunConfig:
    data = DataConfig(
        source=JsonLinesConfig(train="", eval=""),
        tokenizer="train",
        vocab_size=VOCAB,
        prompt="{question}",
        image_size=16,
        rows=8,
        tokens=48,
        images=2,
        workers=0,
    )
    run = RunConfig(
        model=tiny_model(),
        data=data,
        optimizer=OptimizerConfig(lr=3e-3, warmup_steps=2),
        steps=12,
        dtype="float32",
        log_every=3,
        eval_every=6,
        save_every=4,
    )
    return dataclasses.replace(run, **changes)


def text_run(**changes: Any) -> RunConfig:
    """The language model alone: it starts in half the time, for tests of what does not depend on the model."""
    run = tiny_run(**changes)
    model = dataclasses.replace(run.model, vision=None, connector=None, fusion=None)
    return dataclasses.replace(run, model=model, data=dataclasses.replace(run.data, images=0))


def get_config(choice: str = "") -> ml_collections.ConfigDict:
    return to_config_dict(text_run() if choice == "text" else tiny_run())


def thorough(*values: Any, **options: Any) -> Any:
    """Values of a parametrised test that are left out of the ordinary run: another of what it already has (`pytest -m ""`)."""
    return pytest.param(*values, marks=pytest.mark.thorough, **options)


def mesh_of(data: int, fsdp: int, tensor: int) -> jax.sharding.Mesh:
    """A mesh of the first data * fsdp * tensor devices."""
    return make_mesh(MeshConfig(data=data, fsdp=fsdp, tensor=tensor), jax.devices()[: data * fsdp * tensor])


def random_batch(rows: int = 8, seed: int = 0) -> Batch:
    """Two segments a row, two images, random targets; the last row is all padding."""
    rng = np.random.default_rng(seed)
    tokens, images = 12, 2
    segments = np.repeat([[1] * 5 + [2] * 5 + [0] * 2], rows, axis=0).astype(np.int32)
    positions = np.repeat([[*range(5), *range(5), 0, 0]], rows, axis=0).astype(np.int32)
    last = np.repeat([[0, 1, 1, 1, 1, 0, 2, 2, 2, 2, 0, 0]], rows, axis=0).astype(np.int32)
    weights = (rng.random((rows, tokens)) < 0.5).astype(np.float32) * (segments > 0)
    frames = np.ones((rows, images), np.int32)
    for field in (segments, weights, frames, last):
        field[-1] = 0
    return Batch(
        images=rng.integers(0, 255, (rows, images, 1, 16, 16, 3), dtype=np.uint8),
        frames=frames,
        tokens=rng.integers(1, VOCAB, (rows, tokens), dtype=np.int32),
        positions=positions,
        segments=segments,
        media_last=last,
        media_first=last,
        prefix_end=positions,
        targets=rng.integers(1, VOCAB, (rows, tokens), dtype=np.int32),
        weights=weights,
    )


def next_token_sums(logits: Any, batch: Batch) -> Any:
    """The sums of the next-token objective."""
    return sums_of(*scores_of(logits, batch.targets), batch)


COLOURS = {"red": (220, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 220), "black": (0, 0, 0)}


def random_params(model: nn.Module, *args: Any, seed: int = 0) -> Any:
    """Parameters of `model` for `args`, all of them random: open gates, norm scales away from 1, biases away from 0."""
    boxed = jax.eval_shape(model.init, jax.random.key(0), *args)["params"]
    rng = np.random.default_rng(seed)

    def leaf(path: Any, box: Named) -> np.ndarray:
        name, shape = path[-1].key, box.value.shape
        noise = rng.standard_normal(shape).astype(np.float32)
        if name == "kernel":
            names = [axis for axis in box.names if axis != "layers"]
            inputs = shape[len(shape) - len(names) :][: 2 if names[0] == "heads" else 1]
            return noise * np.float32(math.prod(inputs) ** -0.5)
        if name == "scale" or name.endswith("gate"):
            return 1 + 0.2 * noise
        return 0.3 * noise if name == "bias" else noise

    return jax.tree_util.tree_map_with_path(leaf, boxed, is_leaf=lambda x: isinstance(x, Named))


def initial_state(trainer: Trainer, seed: int = 0) -> TrainState:
    """A first state with random parameters, its gates open: `trainer.init()` compiles for seconds."""
    return trainer.state_of(random_params(trainer.model, *trainer.model.example(), seed=seed))


def write_data(folder: Path, examples: int = 24, *, pictures: bool = True) -> Path:
    """A JSON-lines file of coloured squares with a question each, pictures beside it; or of the questions alone."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for number in range(examples):
        name = list(COLOURS)[number % len(COLOURS)]
        question = "<image>\nwhich colour?" if pictures else f"which colour has {number}?"
        record = {"id": str(number), "conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": name}]}
        if pictures:
            Image.new("RGB", (16, 16), COLOURS[name]).save(folder / f"{number}.png")
            record["image"] = f"{number}.png"
        lines.append(json.dumps(record))
    path = folder / "data.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return path
