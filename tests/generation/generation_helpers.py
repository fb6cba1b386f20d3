"""A tiny model with open gates, a tokenizer trained on a few lines, and a generator around them."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tests.tiny import random_params
from vlm_jax.batch import Batch
from vlm_jax.config import (
    BlockConfig,
    DataConfig,
    DecoderConfig,
    EasyVqaConfig,
    GatedCrossAttentionConfig,
    MeshConfig,
    ModelConfig,
    NormConfig,
    PerceiverConfig,
    RopeConfig,
    VitConfig,
)
from vlm_jax.generation.generator import Generator
from vlm_jax.generation.request import Request
from vlm_jax.models.vlm import VisionLanguageModel
from vlm_jax.processing.conversation import Shot, from_prompt
from vlm_jax.processing.recipe import RecipeProcessor
from vlm_jax.processing.tokenizer import train_tokenizer
from vlm_jax.sharding import make_mesh, place_tree, shardings_of

LINES = ["what color is the shape? red", "is there a circle? yes", "how many? two and three", "Question: Answer: no"]


def block(width: int, kv_heads: int) -> BlockConfig:
    return BlockConfig(
        width=width,
        heads=4,
        kv_heads=kv_heads,
        head_width=8,
        mlp_width=64,
        activation="silu",
        gated_mlp=True,
        norm=NormConfig(kind="rms", eps=1e-5),
        qkv_bias=False,
        out_bias=False,
        mlp_bias=False,
    )


def model_config(has_vision: bool = True, layers: int = 3, every: int = 2, media: str = "last", **vision) -> ModelConfig:
    language = DecoderConfig(
        vocab_size=304,
        layers=layers,
        block=block(32, 2),
        positions=RopeConfig(base=10_000.0, scaling=None),
        max_positions=128,
        window=None,
        tied_head=False,
    )
    if not has_vision:
        return ModelConfig(vision=None, connector=None, fusion=None, language=language)
    return ModelConfig(
        vision=VitConfig(image_size=16, patch_size=4, layers=2, block=block(32, 4), **vision),
        connector=PerceiverConfig(latents=4, layers=2, heads=2, head_width=8, mlp_ratio=2),
        fusion=GatedCrossAttentionConfig(every=every, offset=0, heads=4, head_width=8, mlp_width=64, media=media),
        language=language,
    )


def data_config() -> DataConfig:
    return DataConfig(
        source=EasyVqaConfig(),
        tokenizer="train",
        prompt="Question: {question} Answer:",
        image_size=16,
        image_fit="stretch",
        rows=8,
        tokens=64,
        images=2,
    )


@functools.cache
def tokenizer():
    return train_tokenizer(LINES * 5, 296)


def picture(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (16, 16, 3), np.uint8)


def ask(prompt: str, images: Sequence[Any] = (), shots: Sequence[Shot] = ()) -> Request:
    return Request(*from_prompt(prompt, images, shots))


def zeros_batch(rows: int, tokens: int, slots: int, frames: int = 1) -> Batch:
    images = np.zeros((rows, slots, frames, 16, 16, 3), np.uint8)
    names = ("tokens", "positions", "segments", "media_last", "media_first", "prefix_end")
    fields = {name: np.zeros((rows, tokens), np.int32) for name in names}
    return Batch(images=images, frames=np.zeros((rows, slots), np.int32), **fields)


@functools.cache
def params(config: ModelConfig, seed: int = 0):
    """(unboxed, boxed with shapes); gates open, so that the images matter, and logits far apart."""
    model, batch = VisionLanguageModel(config), zeros_batch(1, 4, 1)
    boxed = jax.eval_shape(model.init, jax.random.key(0), batch)["params"]
    plain = jax.tree.map(jnp.asarray, random_params(model, batch, seed=seed))
    return plain, boxed


def one_device():
    return make_mesh(MeshConfig(), jax.devices()[:1])


def new_generator(config: ModelConfig, mesh: MeshConfig | None = None, rows: int = 8) -> Generator:
    """On one device, or on a mesh of all; with parameters of its own."""
    plain, boxed = params(config)
    mesh = make_mesh(mesh) if mesh else one_device()
    own = jax.tree.map(lambda x: jnp.array(x, copy=True), plain)
    own = jax.device_put(own, shardings_of(place_tree(boxed, mesh), mesh))
    return Generator(VisionLanguageModel(config), own, RecipeProcessor(tokenizer(), data_config()), mesh, rows)


@functools.cache
def generator(config: ModelConfig | None = None, mesh: MeshConfig | None = None, rows: int = 8) -> Generator:
    return new_generator(config or model_config(), mesh, rows)
