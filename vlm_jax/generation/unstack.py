"""Layers held one by one, so that a step of the decoding loop reads every matrix where it lies.

In a scan over stacked layers XLA's CPU backend first copies a layer's matrices out of the stack. Training does not notice; a
step for one token does little else than read them. With 38 million parameters in 8 layers, one row and two CPU cores, the
copies halve the tokens a second; layers that stay in the processor's cache gain nothing.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

LEAST = 32 * 2**20  # bytes of language layers from which it is worth the longer compilation
STACKS = (("language", "layers"), ("fusion", "layers"))  # what runs for every token


def worth_unstacking(params: Any) -> bool:
    return sum(x.nbytes for x in jax.tree.leaves(params["language"]["layers"])) >= LEAST


def unstack(params: Any) -> Any:
    """The parameters with the layers of `STACKS` as tuples.

    A stack is freed as soon as its layers are apart: only one parameter is there twice at a time.
    """
    params = dict(params)
    for part, name in STACKS:
        if name in params.get(part, {}):
            params[part] = params[part] | {name: _layers(params[part][name])}
    return params


def stacked(params: Any) -> Any:
    """The inverse of `unstack`: a copy, as large as the model."""
    params = dict(params)
    for part, name in STACKS:
        if isinstance(params.get(part, {}).get(name), tuple):
            params[part] = params[part] | {name: jax.tree.map(lambda *layers: jnp.stack(layers), *params[part][name])}
    return params


def _layers(stack: Any) -> tuple[Any, ...]:
    leaves, tree = jax.tree.flatten(stack)
    split = []
    for leaf in leaves:
        split.append(_split(leaf))
        jax.block_until_ready(split[-1])
        leaf.delete()
    return tuple(jax.tree.unflatten(tree, layer) for layer in zip(*split, strict=True))


def _split(leaf: jax.Array) -> list[jax.Array]:
    """[L, ...] -> L arrays, each on the mesh as the stack is."""
    sharding = leaf.sharding
    if isinstance(sharding, NamedSharding):
        sharding = NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[1:]))
    return jax.jit(lambda x: [x[i] for i in range(x.shape[0])], out_shardings=sharding)(leaf)
