"""The decoder-only language model, and the place between its layers where a fusion may stand.

Axis letters: B rows, T tokens, S cache slots, N query heads, K key/value heads, H head width, D width, L layers, G layers in
between, V vocabulary.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from vlm_jax.config import AlibiConfig, DecoderConfig, LearnedPositionsConfig, RopeConfig
from vlm_jax.layers.block import Block, rematerialised, stacked
from vlm_jax.layers.linear import Linear, Norm
from vlm_jax.ops.attention import attend
from vlm_jax.ops.masks import alibi_bias, causal_mask
from vlm_jax.ops.rotary import rotary_angles, rotate
from vlm_jax.sharding import constrain, named

Array = jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
    """Keys and values of the tokens so far. A slot with segment 0 is empty or padding, and nothing sees it.

    The heads stand before the slots: attention multiplies a matrix a head, and takes each as it lies.
    """

    keys: Array  # [L, B, K, S, H]
    values: Array  # [L, B, K, S, H]
    positions: Array  # [B, S] int32
    segments: Array  # [B, S] int32
    used: Array  # [] int32, slots filled so far, the same for all rows


CACHE_AXES = ("layers", "batch", "kv_heads", "length", "head")


def empty_cache(config: DecoderConfig, rows: int, slots: int, dtype: Any) -> Cache:
    """A cache for `slots` tokens of each of `rows` rows."""
    block = config.block
    shape = (config.layers, rows, block.kv_heads, slots, block.head_width)
    blank = jnp.zeros((rows, slots), jnp.int32)
    empty = constrain(jnp.zeros(shape, dtype), *CACHE_AXES)
    return Cache(empty, empty, blank, blank, jnp.zeros((), jnp.int32))


@dataclasses.dataclass(frozen=True)
class Between:
    """Layers that run before language layers `i` with `i % every == offset`."""

    every: int
    offset: int
    layers: Any  # a pytree with a leading axis G, or a tuple of G
    apply: Callable[[Array, Any], tuple[Array, Any]]  # (x [B, T, D], one of `layers`) -> (x, what to collect)


class Decoder(nn.Module):
    """Tokens -> `embed` -> hidden states -> `head` -> logits."""

    config: DecoderConfig
    dtype: Any
    remat: str = "none"

    def setup(self) -> None:
        config, block = self.config, self.config.block
        small = nn.initializers.normal(block.width**-0.5)
        shape = (config.vocab_size, block.width)
        self.embedding = self.param("embedding", named(small, "vocab", "embed"), shape)
        if isinstance(config.positions, LearnedPositionsConfig):
            shape = (config.max_positions + config.positions.offset, block.width)
            self.position_embedding = self.param("position_embedding", named(small, "positions", "embed"), shape)
        self.block = Block(block, self.dtype, parent=None)
        example = (jnp.zeros((1, 1, block.width)), lambda q, k, v: (q, None))
        self.layers = stacked(self, "layers", self.block, config.layers, *example)
        self.final_norm = Norm(block.norm, block.width, self.dtype)
        if not config.tied_head:
            self.lm_head = Linear({"embed": block.width}, {"vocab": config.vocab_size}, False, self.dtype)

    def embed(self, tokens: Array, positions: Array) -> Array:
        """[B, T] -> [B, T, D]."""
        # Gathered over `fsdp` first: a look-up in a table whose width is sharded would replicate the activations.
        x = jnp.take(constrain(self.embedding, "vocab", None), tokens, axis=0).astype(self.dtype)
        if self.config.scale_embedding:
            x = x * jnp.asarray(self.config.block.width**0.5, self.dtype)
        if isinstance(self.config.positions, LearnedPositionsConfig):
            places = positions + self.config.positions.offset
            x = x + jnp.take(constrain(self.position_embedding, "positions", None), places, axis=0).astype(self.dtype)
        return constrain(x, "batch", "length", None)

    def head(self, hidden: Array) -> Array:
        """[B, T, D] -> logits [B, T, V] float32."""
        if self.config.tied_head:
            logits = jnp.einsum("BTD,VD->BTV", hidden, self.embedding.astype(self.dtype))
        else:
            logits = self.lm_head(hidden)
        return constrain(logits.astype(jnp.float32), "batch", "length", "vocab")

    def __call__(
        self,
        x: Array,
        positions: Array,
        segments: Array,
        cache: Cache | None = None,
        between: Between | None = None,
        prefix_end: Array | None = None,
    ) -> tuple[Array, Cache | None, Any]:
        """Embeddings [B, T, D] -> hidden states [B, T, D], the cache with these tokens in it, and what `between` collected.

        Args:
          positions, segments: [B, T] int32.
          cache: of the tokens before, or None: the row is whole.
          prefix_end: [B, T] int32, the last position each token sees in a prefix-LM; None: its own.
        """
        config = self.config
        if cache is None:
            k_positions, k_segments, kv = positions, segments, None
        else:
            put = lambda old, new: jax.lax.dynamic_update_slice(old, new, (0, cache.used))
            k_positions, k_segments = put(cache.positions, positions), put(cache.segments, segments)
            kv = (cache.keys, cache.values)
        mask_of = _masks(config, prefix_end, positions, k_positions, segments, k_segments)
        angles = bias = None
        if isinstance(config.positions, RopeConfig):
            angles = rotary_angles(config.positions, config.block.head_width, positions, segments)
        elif isinstance(config.positions, AlibiConfig):
            bias = alibi_bias(positions, k_positions, config.block.heads, config.positions.max_bias)

        def layer(carry: tuple[Array, Any], indexed: tuple[Array, Any]) -> tuple[tuple[Array, Any], None]:
            (x, kv), (index, params) = carry, indexed

            def attention_of(q: Array, k: Array, v: Array) -> tuple[Array, Any]:
                if angles is not None:
                    q, k = rotate(q, *angles), rotate(k, *angles)
                if kv is None:
                    return attend(q, k, v, mask_of(index), bias), None
                # The whole cache is carried and one place of it written, so that XLA updates it in place.
                write = lambda old, new: jax.lax.dynamic_update_slice(old, new[None], (index, 0, 0, cache.used, 0))
                new = tuple(write(old, part.astype(old.dtype).swapaxes(1, 2)) for old, part in zip(kv, (k, v), strict=True))
                return attend(q, *(part[index].astype(q.dtype).swapaxes(1, 2) for part in new), mask_of(index), bias), new

            x, kv = self.block.apply({"params": params}, x, attention_of)
            return (constrain(x, "batch", "length", None), kv), None

        (x, kv), collected = _run((x, kv), self.layers, layer, between, self.remat)
        if cache is not None:
            cache = Cache(*kv, k_positions, k_segments, cache.used + positions.shape[1])
        return self.final_norm(x), cache, collected


def _masks(config: DecoderConfig, prefix_end: Array | None, *places: Array) -> Callable[[Any], Array]:
    """The number of a layer -> its mask, from the arguments of `causal_mask`."""
    if not isinstance(config.window, tuple):
        mask = causal_mask(*places, config.window, prefix_end)
        return lambda index: mask
    if len(config.window) != config.layers:
        raise ValueError(f"window: {len(config.window)} windows for {config.layers} layers; expected one each")
    windows = jnp.asarray([jnp.iinfo(jnp.int32).max if window is None else window for window in config.window])
    return lambda index: causal_mask(*places, windows[index], prefix_end)


# Layers of a scanned group that stand in its body one after the other: a loop in a loop copies weights out of their stacks, and
# gradients into them, twice. More would let the compile time of a sparse placement grow with depth.
UNROLL = 8


def _run(carry: Any, layers: Any, layer: Callable, between: Between | None, remat: str) -> tuple[Any, Any]:
    """Scans `layer` over `layers`, and `between` in its places.

    The layers fall into groups of `between.every`; whole groups are scanned, so that compile time does not grow with depth,
    and the rest, fewer than a group, follows. Layers given as a tuple run one after the other.
    """
    if isinstance(layers, tuple):
        return _run_each(carry, layers, layer, between)
    length = jax.tree.leaves(layers)[0].shape[0]
    indexed = (jnp.arange(length), layers)
    part = lambda tree, start, stop: jax.tree.map(lambda p: p[start:stop], tree)
    scan = lambda carry, xs, unroll=1: jax.lax.scan(rematerialised(layer, remat), carry, xs, unroll=unroll)[0]
    if between is None:
        return scan(carry, indexed), None
    every, offset = between.every, between.offset
    cross = rematerialised(between.apply, remat)

    def group(carry: Any, xs: Any, unroll: int = UNROLL) -> tuple[Any, Any]:
        layers, one = xs
        carry = scan(carry, part(layers, 0, offset), unroll) if offset else carry
        x, collected = cross(carry[0], one)
        return scan((x, carry[1]), part(layers, offset, None), unroll), collected

    groups, rest = divmod(length, every)
    collected = []
    if groups:
        grouped = jax.tree.map(lambda p: p.reshape(groups, every, *p.shape[1:]), part(indexed, 0, groups * every))
        carry, seen = jax.lax.scan(group, carry, (grouped, part(between.layers, 0, groups)))
        collected.append(seen)
    if rest:
        last = part(indexed, groups * every, None)
        if offset < rest:
            carry, seen = group(carry, (last, jax.tree.map(lambda p: p[groups], between.layers)), unroll=1)
            collected.append(jax.tree.map(lambda s: s[None], seen))
        else:
            carry = scan(carry, last)
    return carry, jax.tree.map(lambda *parts: jnp.concatenate(parts), *collected) if collected else None


def _run_each(carry: Any, layers: tuple[Any, ...], layer: Callable, between: Between | None) -> tuple[Any, Any]:
    """`_run` without a scan."""
    collected = []
    for index, params in enumerate(layers):
        if between is not None and index % between.every == between.offset:
            x, seen = between.apply(carry[0], between.layers[index // between.every])
            carry = (x, *carry[1:])
            collected.append(seen)
        carry, _ = layer(carry, (index, params))
    return carry, jax.tree.map(lambda *parts: jnp.stack(parts), *collected) if collected else None
