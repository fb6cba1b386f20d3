"""What Flamingo's Perceiver resampler was compared with (Alayrac et al. 2022, table 3, vi): a transformer, and an MLP."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from vlm_jax.config import BlockConfig, ResidualMlpConfig, TransformerResamplerConfig
from vlm_jax.config.register import MODULES
from vlm_jax.layers.block import Block, Mlp
from vlm_jax.layers.linear import Norm
from vlm_jax.layers.perceiver import add_time
from vlm_jax.layers.stack import stacked
from vlm_jax.ops.attention import attend
from vlm_jax.ops.masks import Mask
from vlm_jax.sharding import constrain, named

Array = jax.Array


@MODULES.add(TransformerResamplerConfig)
class TransformerResampler(nn.Module):
    """Features [B, M, I, P, D] of any number of frames -> visual tokens [B, M, R, D].

    Where a Perceiver's latents look at the features and themselves, here all look at all, and the features change too.
    """

    config: TransformerResamplerConfig
    width: int
    dtype: Any

    @nn.compact
    def __call__(
        self, features: Array, frames: Array, *, mask: Array | None = None, return_attention: bool = False
    ) -> tuple[Array, None]:
        """Arguments as of `PerceiverResampler`.

        Raises:
          ValueError: `return_attention`: features that look at each other do not stand for their own place.
        """
        if return_attention:
            raise ValueError("a transformer's features look at each other: attention of its latents does not lead to places")
        config = self.config
        rows, slots, most, patches, width = features.shape
        features = add_time(self, features, frames, number=config.time_embeddings)
        init = named(nn.initializers.normal(1.0), "latents", "embed")
        latents = self.param("latents", init, (config.latents, width)).astype(self.dtype)
        x = features.reshape(rows * slots, -1, width).astype(self.dtype)
        x = jnp.concatenate([jnp.broadcast_to(latents, (len(x), *latents.shape)), x], axis=1)
        seen = jnp.broadcast_to((jnp.arange(most) < frames[..., None])[..., None], (rows, slots, most, patches))
        seen = (seen if mask is None else seen & mask).reshape(rows * slots, -1)
        keys = Mask.from_keys(jnp.pad(seen, ((0, 0), (config.latents, 0)), constant_values=True))
        block = Block(_block(config, width), self.dtype, parent=None)
        see_keys = lambda q, k, v: (attend(q, k, v, keys), None)
        params = stacked(self, "layers", block, config.layers, jnp.zeros((1, 1, width)), lambda q, k, v: (q, None))
        layer = lambda x, params: (block.apply({"params": params}, x, see_keys)[0], None)
        x = jax.lax.scan(layer, x, params)[0]
        x = Norm(config.norm, width, self.dtype, name="norm")(x[:, : config.latents])
        return x.reshape(rows, slots, config.latents, width), None


def _block(config: TransformerResamplerConfig, width: int) -> BlockConfig:
    return BlockConfig(
        width=width,
        heads=config.heads,
        kv_heads=config.heads,
        head_width=config.head_width,
        mlp_width=config.mlp_ratio * width,
        activation=config.activation,
        gated_mlp=False,
        norm=config.norm,
        qkv_bias=False,
        out_bias=False,
        mlp_bias=False,
    )


class ResidualMlpLayer(nn.Module):
    """x + feed-forward(norm x)."""

    config: ResidualMlpConfig
    width: int
    dtype: Any

    @nn.compact
    def __call__(self, x: Array) -> Array:
        config, width = self.config, self.width
        y = Norm(config.norm, width, self.dtype, name="norm")(x)
        return x + Mlp(width, config.mlp_ratio * width, config.activation, False, False, self.dtype, name="mlp")(y)


@MODULES.add(ResidualMlpConfig)
class ResidualMlp(nn.Module):
    """Features [B, M, I, P, D] -> visual tokens [B, M, I * P, D]. A frame that is not there gives zeros."""

    config: ResidualMlpConfig
    width: int
    dtype: Any

    @nn.compact
    def __call__(
        self, features: Array, frames: Array, *, mask: Array | None = None, return_attention: bool = False
    ) -> tuple[Array, None]:
        """Arguments as of `PerceiverResampler`.

        Raises:
          ValueError: `return_attention`: a visual token is one feature, so there is nothing to tell.
        """
        if return_attention:
            raise ValueError("an MLP makes each visual token of one feature: it looks nowhere else")
        config = self.config
        rows, slots, most, _, width = features.shape
        x = add_time(self, features, frames, number=config.time_embeddings)
        x = x.reshape(rows, -1, width).astype(self.dtype)
        layer = ResidualMlpLayer(config, width, self.dtype, parent=None)
        params = stacked(self, "layers", layer, config.layers, jnp.zeros((1, 1, width)))
        x = jax.lax.scan(lambda x, params: (layer.apply({"params": params}, x), None), x, params)[0]
        x = Norm(config.norm, width, self.dtype, name="norm")(x).reshape(features.shape)
        there = (jnp.arange(most) < frames[..., None])[..., None]
        there = there if mask is None else there & mask
        x = jnp.where(there[..., None], x, 0).reshape(rows, slots, -1, width)
        return constrain(x, "batch", None, "length", None), None
