"""Idefics3's and SmolVLM's connector (Laurencon et al. 2024): squares of neighbouring features become one visual token."""

from __future__ import annotations

import math
from typing import Any

import flax.linen as nn
import jax

from vlm_jax.config import PixelShuffleConfig
from vlm_jax.config.register import MODULES
from vlm_jax.layers.linear import Linear, Norm
from vlm_jax.sharding import constrain

Array = jax.Array


@MODULES.add(PixelShuffleConfig)
class PixelShuffle(nn.Module):
    """Features [B, M, I, P, D] of square pictures -> visual tokens [B, M, I * P / factor^2, O]."""

    config: PixelShuffleConfig
    width: int
    dtype: Any

    @nn.compact
    def __call__(
        self, features: Array, frames: Array, *, mask: Array | None = None, return_attention: bool = False
    ) -> tuple[Array, None]:
        """
        Raises:
          ValueError: features that are not of a square whose side `factor` divides; `return_attention`: a visual token reads
            its own square and nothing else.
        """
        config, factor = self.config, self.config.factor
        if return_attention:
            raise ValueError("pixel shuffle makes each visual token of one square of features: it looks nowhere else")
        rows, slots, most, count, width = features.shape
        side = math.isqrt(count)
        if side * side != count or side % factor:
            raise ValueError(f"pixel shuffle by {factor}: {count} features are no square whose side is a multiple of {factor}")
        if config.norm is not None:
            features = Norm(config.norm, width, self.dtype, name="norm")(features)
        squares = features.reshape(rows, slots, most, side // factor, factor, side // factor, factor, width)
        squares = squares.transpose(0, 1, 2, 3, 5, 4, 6, 7).reshape(rows, slots, -1, factor * factor * width)
        sizes = {"embed": squares.shape[-1]}, {"mlp": config.width}
        linear = Linear(*sizes, bias=False, dtype=self.dtype, init_gain=config.initial_std, name="linear")
        return constrain(linear(squares), "batch", None, "length", None), None
