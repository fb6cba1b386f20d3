"""Published pairs of towers by name: `two_towers("clip-b/32")`."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

from vlm_jax.config import (
    DecoderConfig,
    DualEncoderConfig,
    ImageTowerConfig,
    LearnedPositionsConfig,
    TextTowerConfig,
)
from vlm_jax.config.register import Register
from vlm_jax.models.sizes import vision

TOWERS: Register[Callable[[], DualEncoderConfig]] = Register("two towers of the name")
CLIP_SCALE = 2.6592  # log(1 / 0.07), as the authors write it


def two_towers(name: str) -> DualEncoderConfig:
    """
    Raises:
      RegisterError: an unknown name; the message lists those that are known.
    """
    return TOWERS[name]()


def _text(like: str, *, layers: int, width: int, heads: int, mlp_width: int, vocab_size: int, positions: int) -> DecoderConfig:
    """A text encoder whose blocks are of the kind of an image encoder's."""
    sizes = dict(width=width, heads=heads, kv_heads=heads, head_width=width // heads, mlp_width=mlp_width)
    return DecoderConfig(
        vocab_size=vocab_size,
        layers=layers,
        block=dataclasses.replace(vision(like).block, **sizes),
        positions=LearnedPositionsConfig(),
        max_positions=positions,
        window=None,
        tied_head=True,
    )


def _clip(image: str, *, width: int, heads: int, projection: int) -> Callable[[], DualEncoderConfig]:
    def make() -> DualEncoderConfig:
        sizes = dict(layers=12, width=width, heads=heads, mlp_width=4 * width, vocab_size=49_408, positions=77)
        return DualEncoderConfig(
            image=ImageTowerConfig(encoder=vision(image), pool="class_token", projection=projection),
            text=TextTowerConfig(
                encoder=_text(image, **sizes),
                causal=True,
                pool="end_token",
                projection=projection,
                projection_bias=False,
            ),
            loss="softmax",
            logit_scale=CLIP_SCALE,
        )

    return make


def _siglip(image: str) -> Callable[[], DualEncoderConfig]:
    def make() -> DualEncoderConfig:
        encoder = vision(image)
        block = encoder.block
        sizes = dict(width=block.width, heads=block.heads, mlp_width=block.mlp_width, vocab_size=32_000, positions=64)
        return DualEncoderConfig(
            image=ImageTowerConfig(encoder=encoder, pool="attention"),
            text=TextTowerConfig(
                encoder=_text(image, layers=encoder.layers, **sizes),
                causal=False,
                pool="last",
                projection=block.width,
                projection_bias=True,
            ),
            loss="sigmoid",
            logit_scale=math.log(10.0),
            logit_bias=-10.0,
        )

    return make


TOWERS.add("clip-b/32")(_clip("clip-b/32", width=512, heads=8, projection=512))
TOWERS.add("clip-l/14")(_clip("clip-l/14", width=768, heads=12, projection=768))
TOWERS.add("clip-l/14-336")(_clip("clip-l/14-336", width=768, heads=12, projection=768))
TOWERS.add("siglip-b/16")(_siglip("siglip-b/16"))
TOWERS.add("siglip-so400m/14-384")(_siglip("siglip-so400m/14-384"))
