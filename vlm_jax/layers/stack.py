"""A stack of layers: its parameters, and how they run: scanned, in groups between other layers, or a few at a time."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from vlm_jax.sharding import stacked_init

Array = jax.Array


def stacked(parent: nn.Module, name: str, layer: nn.Module, length: int, *example: Any) -> Mapping[str, Any]:
    """The parameters of `length` copies of `layer`, each with a leading `layers` axis, as one parameter of `parent`.

    The tree does not depend on how the layers are run: scanned, grouped between other layers, or one by one. A caller may
    also give the parameters as a tuple of layers; generation does, see `generation/by_layer.py`; and with more beside a kernel
    than `layer.init` makes: an int8 kernel's scales, adapters. Shapes are checked where a layer is applied.

    Args:
      example: arguments of `layer.__call__`, of the right widths.
    """
    if parent.has_variable("params", name):
        return parent.get_variable("params", name)

    return parent.param(name, stacked_init(lambda key: layer.init(key, *example)["params"], length))


PIECE = "piece"  # the name of such a program in a jaxpr


def piece(fn: Callable[..., Any]) -> Callable[..., Any]:
    """`fn` as a program of its own, where `generation/by_layer.py` cuts what is compiled; elsewhere it makes no difference."""
    run = lambda *args: fn(*args)
    run.__name__ = PIECE
    return jax.jit(run)


REMAT_POLICIES = {
    "none": None,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}


def rematerialised(fn: Callable[..., Any], remat: str) -> Callable[..., Any]:
    """`fn` under `jax.checkpoint` with the policy of `RunConfig.remat`."""
    if remat == "none":
        return fn
    # Inside a scan common-subexpression elimination cannot undo the recomputation.
    return jax.checkpoint(fn, policy=REMAT_POLICIES[remat], prevent_cse=False)


@dataclasses.dataclass(frozen=True)
class InterleavedLayers:
    """Layers that run before language layers `start + i` with `i % every == offset`, or `within` them."""

    every: int
    offset: int
    layers: Any  # a pytree with a leading axis L, or a tuple of L
    apply: Callable[[Array, Any], tuple[Array, Any]]  # (x [B, T, D], one of `layers`) -> (x, what to collect)
    start: int = 0
    within: bool = False  # between the attention and the feed-forward of the language layer

    def number(self, layer: int) -> int | None:
        """Which of them belongs to a language layer; None: none does."""
        group, place = divmod(layer - self.start, self.every)
        return group if group >= 0 and place == self.offset else None


class LanguageInputs(NamedTuple):
    """What a fusion makes of embeddings and visual tokens: what the language model then runs on."""

    embeddings: Array  # [B, T, D]
    interleaved: InterleavedLayers | None = None
    prefix_end: Array | None = None  # [B, T] int32, the last position each token sees in a prefix-LM; None: its own
    prefix_segments: Array | None = None  # [B, T] int32, as in `Batch`


# So many layers are compiled one after the other, in the body of a scanned group or as a piece: a loop in a loop copies weights
# out of their stacks, and gradients into them, twice. More would let the compile time grow with depth.
UNROLL = 8


def run_layers(
    carry: Any, layers: Any, own: Any, layer: Callable, interleaved: InterleavedLayers | None, remat: str
) -> tuple[Any, Any, Any]:
    """Scans `layer` over `layers`, and `interleaved` in its places.

    The layers fall into groups of `interleaved.every`; whole groups are scanned, so that compile time does not grow with depth,
    and the rest, fewer than a group, follows. Layers given as a tuple run one after the other.

    Args:
      own: of layers in a tuple, what each has of its own beside its parameters; None: nothing.

    Returns:
      the carry, what the layers gave beside it, [L, ...] or of a tuple one by one, and what those between collected, [L, ...].
    """
    if isinstance(layers, tuple):
        return _run_each(carry, layers, own, layer, interleaved)
    length = _length(layers)
    indexed = (jnp.arange(length), layers, None)
    scan = lambda carry, xs, unroll=1: jax.lax.scan(rematerialised(layer, remat), carry, xs, unroll=unroll)
    if interleaved is None:
        return *scan(carry, indexed), None
    every, offset, start = interleaved.every, interleaved.offset, interleaved.start
    cross = rematerialised(interleaved.apply, remat)
    within = rematerialised(functools.partial(_run_within, layer, interleaved.apply), remat)

    def group(carry: Any, xs: Any, unroll: int = UNROLL) -> tuple[Any, Any]:
        layers, one = xs
        given, first = [], offset
        if offset:
            carry, before = scan(carry, _part(layers, 0, offset), unroll)
            given.append(before)
        if interleaved.within:
            carry, (middle, collected) = within(carry, jax.tree.map(lambda p: p[offset], layers), one)
            given.append(jax.tree.map(lambda x: x[None], middle))
            first = offset + 1
        else:
            x, collected = cross(carry[0], one)
            carry = (x, *carry[1:])
        if first < _length(layers):
            carry, behind = scan(carry, _part(layers, first, None), unroll)
            given.append(behind)
        return carry, (_joined(given), collected)

    groups, rest = divmod(length - start, every)
    given, collected = [], []
    if start:
        carry, one = scan(carry, _part(indexed, 0, start))
        given.append(one)
    if groups:
        whole = _part(indexed, start, start + groups * every)
        grouped = jax.tree.map(lambda p: p.reshape(groups, every, *p.shape[1:]), whole)
        carry, (one, seen) = jax.lax.scan(group, carry, (grouped, _part(interleaved.layers, 0, groups)))
        given.append(jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), one))
        collected.append(seen)
    if rest:
        last = _part(indexed, start + groups * every, None)
        if offset < rest:
            carry, (one, seen) = group(carry, (last, jax.tree.map(lambda p: p[groups], interleaved.layers)), unroll=1)
            collected.append(jax.tree.map(lambda s: s[None], seen))
        else:
            carry, one = scan(carry, last)
        given.append(one)
    return carry, _joined(given), _joined(collected)


def _run_within(layer: Callable, apply: Callable, carry: Any, indexed: Any, one: Any) -> tuple[Any, tuple[Any, Any]]:
    """`layer` with `apply` of `one` between its attention and its feed-forward: as `layer`, and what is collected."""
    seen = []

    def between(x: Array) -> Array:
        x, collected = apply(x, one)
        seen.append(collected)
        return x

    carry, given = layer(carry, indexed, between)
    return carry, (given, seen[0])


def _length(layers: Any) -> int:
    return jax.tree.leaves(layers)[0].shape[0]


def _part(layers: Any, start: int, stop: int | None) -> Any:
    return jax.tree.map(lambda p: p[start:stop], layers)


def _joined(parts: list[Any]) -> Any:
    return jax.tree.map(lambda *parts: jnp.concatenate(parts), *parts) if parts else None


def _run_each(
    carry: Any, layers: tuple[Any, ...], own: Any, layer: Callable, interleaved: InterleavedLayers | None
) -> tuple[Any, Any, Any]:
    """`run_layers` without a scan, some layers at a time."""

    def several(carry: Any, some: tuple[Any, ...]) -> tuple[Any, Any]:
        kept, aux, collected = [], [], []
        for index, params, mine, gated in some:
            if gated is not None and interleaved.within:
                carry, ((one, more), seen) = _run_within(layer, interleaved.apply, carry, (index, params, mine), gated)
                collected.append(seen)
            else:
                if gated is not None:
                    x, seen = interleaved.apply(carry[0], gated)
                    carry = (x, *carry[1:])
                    collected.append(seen)
                carry, (one, more) = layer(carry, (index, params, mine))
            kept.append(one)
            aux.append(more)
        return carry, (kept, aux, collected)

    numbers = [None if interleaved is None else interleaved.number(index) for index in range(len(layers))]
    gated = [None if number is None else interleaved.layers[number] for number in numbers]
    table = list(zip(range(len(layers)), layers, own or (None,) * len(layers), gated, strict=True))
    run, size = piece(several), _piece_size(len(layers), interleaved.every if interleaved else 1)
    kept, aux, collected = [], [], []
    for start in range(0, len(layers), size):
        carry, given = run(carry, tuple(table[start : start + size]))
        for parts, more in zip((kept, aux, collected), given, strict=True):
            parts += more
    stack = lambda parts: jax.tree.map(lambda *parts: jnp.stack(parts), *parts) if parts else None
    return carry, (kept, stack(aux)), stack(collected)


def _piece_size(layers: int, every: int) -> int:
    """At most `UNROLL` layers: a multiple of `every` where that fits, and if possible one that leaves no smaller piece."""
    sizes = [size for size in range(UNROLL, 0, -1) if size % every == 0] or [UNROLL]
    return next((size for size in sizes if layers % size == 0 and 2 * size >= sizes[0]), sizes[0])
