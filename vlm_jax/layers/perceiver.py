"""Flamingo's Perceiver resampler (Alayrac et al. 2022, section 3.1, appendix A.1.1), and IDEFICS2's (Laurencon et al. 2024)."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from vlm_jax.config import PerceiverConfig
from vlm_jax.config.register import MODULES
from vlm_jax.layers.block import Attention, Mlp
from vlm_jax.layers.linear import Norm
from vlm_jax.layers.stack import stacked
from vlm_jax.ops.masks import Mask
from vlm_jax.sharding import named

Array = jax.Array


class PerceiverLayer(nn.Module):
    """latents + attention(latents over features and latents), then + feed-forward."""

    config: PerceiverConfig
    width: int
    dtype: Any

    def setup(self) -> None:
        config, norm = self.config, self.config.norm
        self.feature_norm = Norm(norm, self.width, self.dtype)
        self.latent_norm = Norm(norm, self.width, self.dtype)
        self.attention = Attention(
            self.width,
            self.width,
            config.heads,
            config.kv_heads or config.heads,
            config.head_width,
            self.dtype,
            qk_norm=norm if config.qk_norm else None,
        )
        self.mlp_norm = Norm(norm, self.width, self.dtype)
        self.mlp = Mlp(self.width, config.mlp_ratio * self.width, config.activation, config.gated_mlp, False, self.dtype)

    def _inputs(self, latents: Array, features: Array) -> tuple[Array, Any]:
        queries = self.latent_norm(latents)
        keys = jnp.concatenate([self.feature_norm(features), queries], axis=1)
        return queries, self.attention.keys_values(keys)

    def weights(self, latents: Array, features: Array, mask: Mask) -> Array:
        """Where each latent looks: [B, R, I * P + R]."""
        return self.attention.weights(*self._inputs(latents, features), mask)

    def __call__(self, latents: Array, features: Array, mask: Mask) -> Array:
        latents = latents + self.attention(*self._inputs(latents, features), mask)
        return latents + self.mlp(self.mlp_norm(latents))


@MODULES.add(PerceiverConfig)
class PerceiverResampler(nn.Module):
    """Features [B, M, I, P, D] of any number of frames -> visual tokens [B, M, R, D], or with `per_frame` [B, M, I * R, D]."""

    config: PerceiverConfig
    width: int
    dtype: Any

    @nn.compact
    def __call__(
        self, features: Array, frames: Array, *, mask: Array | None = None, return_attention: bool = False
    ) -> tuple[Array, Array | None]:
        """
        Args:
          features: [B, M, I, P, D].
          frames: [B, M] int32, how many frames of the slot are there.
          return_attention: also return where every latent of every layer looks.
          mask: [B, M, I, P] bool, the features that are; None: all of the frames that are there.

        Returns:
          visual tokens, and None or the weights [layers, B, M, R, I * P + R] (the last R keys are the latents).

        Raises:
          ValueError: `return_attention` with latents for every frame.
        """
        config = self.config
        if return_attention and config.per_frame:
            raise ValueError("attention of latents is returned for whole media, and this resampler has latents for every frame")
        if config.projection is not None:
            wide = config.projection
            to = Mlp(self.width, wide.mlp_width, wide.activation, True, False, self.dtype, wide.width, name="projection")
            features = to(features.reshape(features.shape[0], -1, self.width)).reshape(*features.shape[:-1], wide.width)
        rows, slots, most, patches, width = features.shape
        features = add_time(self, features, frames, number=config.time_embeddings)
        init = named(nn.initializers.normal(1.0), "latents", "embed")
        latents = self.param("latents", init, (config.latents, width)).astype(self.dtype)
        # What is made into latents at once: a slot, or each of its frames.
        count = rows * slots * (most if config.per_frame else 1)
        latents = jnp.broadcast_to(latents, (count, *latents.shape))
        features = features.reshape(count, -1, width)
        in_time = jnp.arange(most) < frames[..., None]
        seen = jnp.broadcast_to(in_time[..., None], (rows, slots, most, patches))
        seen = (seen if mask is None else seen & mask).reshape(count, -1)
        keys = Mask.from_keys(jnp.pad(seen, ((0, 0), (0, config.latents)), constant_values=True))

        layer = PerceiverLayer(config, width, self.dtype, parent=None)
        example = jnp.zeros((1, 1, width))
        params = stacked(self, "layers", layer, config.layers, example, example, Mask.from_keys(jnp.ones((1, 2), bool)))

        def step(latents: Array, params: Any) -> tuple[Array, Array | None]:
            variables = {"params": params}
            looks = layer.apply(variables, latents, features, keys, method="weights") if return_attention else None
            return layer.apply(variables, latents, features, keys), looks

        latents, weights = jax.lax.scan(step, latents, params)
        latents = Norm(config.norm, width, self.dtype, name="norm")(latents)
        weights = weights.reshape(-1, rows, slots, *weights.shape[2:]) if return_attention else None
        return latents.reshape(rows, slots, -1, width), weights


def add_time(module: nn.Module, features: Array, frames: Array, *, number: int) -> Array:
    """Features [B, M, I, P, D] with a learned embedding of the time of their frame, a parameter of `module`.

    Frame `f` of a slot with `n` frames gets embedding `f`; when `n` is more than were learned, the embeddings are interpolated
    linearly over them, as Flamingo does to go from 8 frames in training to 30.

    Args:
      frames: [B, M] int32, how many frames of the slot are there.
      number: of embeddings; 0: the features stay as they are.
    """
    if not number:
        return features
    init = named(nn.initializers.normal(0.02), "positions", "embed")
    table = module.param("time_embeddings", init, (number, features.shape[-1]))
    return features + _time(table, frames, features.shape[2])[:, :, :, None].astype(features.dtype)


def _time(table: Array, frames: Array, most: int) -> Array:
    """The time embedding of each frame: table [times, D], frames [B, M] -> [B, M, most, D]."""
    learned = table.shape[0]
    stretch = jnp.where(frames > learned, (learned - 1) / jnp.maximum(frames - 1, 1), 1.0)
    place = jnp.clip(jnp.arange(most) * stretch[..., None], 0, learned - 1)
    low = jnp.floor(place).astype(jnp.int32)
    high = jnp.minimum(low + 1, learned - 1)
    share = (place - low)[..., None]
    return table[low] * (1 - share) + table[high] * share
