"""Mixture of experts in the place of a block's feed-forward (Shazeer et al. 2017; Mixtral, Jiang et al. 2024)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
from jax.sharding import PartitionSpec

from vlm_jax.config import BlockConfig
from vlm_jax.layers.linear import Linear
from vlm_jax.ops.activations import ACTIVATIONS
from vlm_jax.ops.experts import mixture, route
from vlm_jax.sharding import constrain, named, place

Array = jax.Array


class MixtureOfExperts(nn.Module):
    """A linear router, and the weighted sum of the experts it chooses for a token."""

    config: BlockConfig
    dtype: Any

    @nn.compact
    def __call__(self, x: Array) -> tuple[Array, Array]:
        """[B, T, D] -> [B, T, D], and what the router says of every token: [B, T, E]."""
        config, experts = self.config, self.config.experts
        if config.mlp_bias:
            raise ValueError("config.block: experts have no biases; set mlp_bias=False")
        logits = Linear({"embed": config.width}, {"experts": experts.number}, False, self.dtype, name="router")(x)
        y = Experts(config, self.dtype, name="experts")(x, logits)
        return constrain(y, "batch", "length", None), logits


class Experts(nn.Module):
    """Feed-forwards of one shape: gate and up [E, D, F], down [E, F, D]."""

    config: BlockConfig
    dtype: Any

    @nn.compact
    def __call__(self, x: Array, logits: Array) -> Array:
        """Tokens [B, T, D] and what the router says of them, [B, T, E] -> [B, T, D]."""
        config, number = self.config, self.config.experts.number
        init = nn.initializers.variance_scaling(1.0, "fan_in", "truncated_normal", in_axis=1, out_axis=2, batch_axis=0)
        wide, narrow = (number, config.width, config.mlp_width), (number, config.mlp_width, config.width)
        kernel = lambda name, axes, shape: self.param(name, named(init, "experts", *axes), shape).astype(self.dtype)
        gate = kernel("gate", ("embed", "mlp"), wide) if config.gated_mlp else None
        up, down = kernel("up", ("embed", "mlp"), wide), kernel("down", ("mlp", "embed"), narrow)

        def local(x: Array, logits: Array, gate: Array | None, up: Array, down: Array) -> Array:
            flat = x.reshape(-1, config.width)
            chosen = route(logits.reshape(-1, number), config.experts.chosen)
            return mixture(flat, *chosen, gate, up, down, ACTIVATIONS[config.activation]).reshape(x.shape)

        return _over_the_mesh(local, x.astype(self.dtype), logits, gate, up, down)


def _over_the_mesh(local: Callable[..., Array], x: Array, logits: Array, gate: Array | None, up: Array, down: Array) -> Array:
    """`local` of the rows that a device has, with its slice of every expert; the slices' results are added up.

    By hand, for XLA would sort the tokens of all devices together.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return local(x, logits, gate, up, down)
    tokens = place(("batch", "length", None), x.shape, mesh).spec
    wide = place(("experts", None, "mlp"), up.shape, mesh).spec
    narrow = PartitionSpec(wide[0], wide[2], wide[1])
    add = lambda y: y if wide[2] is None else jax.lax.psum(y, wide[2])
    parallel = jax.shard_map(lambda *args: add(local(*args)), in_specs=(tokens, tokens, wide, wide, narrow), out_specs=tokens)
    return parallel(x, logits, gate, up, down)
