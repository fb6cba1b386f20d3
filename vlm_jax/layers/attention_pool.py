"""Attention pooling (Lee et al. 2019; Zhai et al. 2022): SigLIP's way from the features of an image to one vector."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from vlm_jax.config import BlockConfig
from vlm_jax.layers.block import Attention, Mlp
from vlm_jax.layers.linear import Norm
from vlm_jax.sharding import named

Array = jax.Array


class AttentionPool(nn.Module):
    """A learned query attends to the features, and a feed-forward is added: [B, P, D] -> [B, D]."""

    config: BlockConfig
    dtype: Any

    @nn.compact
    def __call__(self, features: Array) -> Array:
        config, width = self.config, self.config.width
        attention = Attention(
            width,
            width,
            config.heads,
            config.kv_heads,
            config.head_width,
            self.dtype,
            config.qkv_bias,
            config.out_bias,
            name="attention",
        )
        mlp = Mlp(width, config.mlp_width, config.activation, config.gated_mlp, config.mlp_bias, self.dtype, name="mlp")
        probe = self.param("probe", named(nn.initializers.normal(width**-0.5), "embed"), (width,))
        queries = jnp.broadcast_to(probe.astype(self.dtype), (features.shape[0], 1, width))
        x = attention(queries, attention.keys_values(features))
        return (x + mlp(Norm(config.norm, width, self.dtype, name="norm")(x)))[:, 0]
