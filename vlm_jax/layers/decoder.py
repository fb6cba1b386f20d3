"""The decoder-only language model, and the place between its layers where a fusion may stand."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from vlm_jax.config import AlibiConfig, DecoderConfig, LearnedPositionsConfig, RopeConfig
from vlm_jax.config.register import MODULES
from vlm_jax.layers.block import Block
from vlm_jax.layers.linear import Linear, Norm
from vlm_jax.layers.stack import LanguageInputs, run_layers, stacked
from vlm_jax.ops.attention import attend
from vlm_jax.ops.masks import Mask, alibi_of, causal_mask
from vlm_jax.ops.rotary import rotary_angles, rotate
from vlm_jax.sharding import constrain, named

Array = jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
    """Keys and values of the tokens so far, each row's from its slot 0 on. A slot with segment 0 is empty: nothing sees it.

    The heads stand before the slots: attention multiplies a matrix a head, and takes each as it lies.
    """

    keys: Any  # [L, B, K, S, H], or where layers are held one by one a tuple of L
    values: Any  # likewise
    positions: Array  # [B, S] int32
    segments: Array  # [B, S] int32
    used: Array  # [B] int32, slots that are filled

    def with_slots(self, slots: int) -> Cache:
        """With so many slots, the new ones empty."""
        wide = lambda x, axis: jnp.pad(x, [(0, slots - x.shape[axis] if axis == at else 0) for at in range(x.ndim)])
        keys, values = (jax.tree.map(lambda x: _placed(wide(x, x.ndim - 2)), part) for part in (self.keys, self.values))
        return Cache(keys, values, wide(self.positions, 1), wide(self.segments, 1), self.used)

    def map_rows(self, fn: Callable[..., Array], *others: Cache) -> Cache:
        """`fn(array, *arrays of the others, axis=that of the rows)` of every array."""
        of_layers = functools.partial(fn, axis=0 if isinstance(self.keys, tuple) else 1)
        parts = {name: [getattr(cache, name) for cache in (self, *others)] for name in ("keys", "values")}
        rest = {
            name: fn(*(getattr(cache, name) for cache in (self, *others)), axis=0) for name in ("positions", "segments", "used")
        }
        return Cache(**{name: jax.tree.map(of_layers, *part) for name, part in parts.items()}, **rest)

    def placed(self) -> Cache:
        """Where it lies on the mesh of the context, so that it keeps its place from step to step."""
        keys, values = (jax.tree.map(_placed, part) for part in (self.keys, self.values))
        return dataclasses.replace(self, keys=keys, values=values)


def _placed(x: Array) -> Array:
    return constrain(x, *("layers", "batch", "kv_heads", "length", "head")[-x.ndim :])


class Output(NamedTuple):
    """What a language model gives of tokens."""

    hidden: Array  # [B, T, D]
    cache: Cache | None  # with these tokens in it
    interleaved: Any  # what the interleaved layers collected, [L, ...]
    layers: dict[str, Array]  # auxiliary outputs of each layer, [L, ...]; see `Block`


@MODULES.add(DecoderConfig)
class Decoder(nn.Module):
    """Tokens -> `embed` -> hidden states -> `head` -> logits."""

    config: DecoderConfig
    dtype: Any
    remat: str = "none"

    def setup(self) -> None:
        config, block = self.config, self.config.block
        small = nn.initializers.normal(block.width**-0.5)
        outer, inner = config.embedding_width or block.width, block.width
        shape = (config.vocab_size, outer)
        self.embedding = self.param("embedding", named(small, "vocab", "embed"), shape)
        if not isinstance(config.positions, RopeConfig | LearnedPositionsConfig | AlibiConfig):
            raise ValueError(f"positions of the kind {config.positions.kind!r}: this decoder knows rope, learned and alibi")
        if isinstance(config.positions, LearnedPositionsConfig):
            if config.max_positions is None:
                raise ValueError("max_positions=None: learned positions need their number")
            shape = (config.max_positions + config.positions.offset, inner)
            self.position_embedding = self.param("position_embedding", named(small, "positions", "embed"), shape)
        if config.token_types:
            shape = (config.token_types, inner)
            self.type_embedding = self.param("type_embedding", named(small, "positions", "embed"), shape)
        if config.embedding_norm:
            self.embedding_norm = Norm(block.norm, inner, self.dtype)
        self.block = Block(block, self.dtype, parent=None)
        example = (jnp.zeros((1, 1, inner)), lambda q, k, v: (q, None))
        self.layers = stacked(self, "layers", self.block, config.layers, *example)
        if config.final_norm:
            self.final_norm = Norm(block.norm, inner, self.dtype)
        if config.embedding_width is not None:
            self.project_in = Linear({"projection": outer}, {"embed": inner}, False, self.dtype)
            self.project_out = Linear({"embed": inner}, {"projection": outer}, False, self.dtype)
        if not config.tied_head:
            self.lm_head = Linear({"embed": outer}, {"vocab": config.vocab_size}, config.head_bias, self.dtype)

    def embed(self, tokens: Array) -> Array:
        """[B, T] -> [B, T, D], what visual tokens may stand in the places of; learned positions are added to both later."""
        # Gathered over `fsdp` first: a look-up in a table whose width is sharded would replicate the activations.
        x = jnp.take(constrain(self.embedding, "vocab", None), tokens, axis=0).astype(self.dtype)
        if self.config.scale_embedding:
            x = x * jnp.asarray(self.config.block.width**0.5, self.dtype)
        if self.config.embedding_width is not None:
            x = self.project_in(x)
        return constrain(x, "batch", "length", None)

    def head(self, hidden: Array) -> Array:
        """[B, T, D] -> logits [B, T, V] float32."""
        if self.config.embedding_width is not None:
            hidden = self.project_out(hidden)
        if self.config.tied_head:
            logits = jnp.einsum("BTD,VD->BTV", hidden, self.embedding.astype(self.dtype))
        else:
            logits = self.lm_head(hidden)
        return constrain(logits.astype(jnp.float32), "batch", "length", "vocab")

    def __call__(
        self,
        inputs: LanguageInputs,
        positions: Array,
        segments: Array,
        *,
        cache: Cache | None = None,
        return_cache: bool = False,
    ) -> Output:
        """Embeddings [B, T, D] -> hidden states [B, T, D].

        Args:
          inputs: the embeddings, and what a fusion adds to them.
          positions, segments: [B, T] int32.
          cache: of the tokens before these, which are written behind them; None: these are the first.
          return_cache: whether the first tokens leave a cache, of T slots. Padding stands behind them then.
        """
        config, x, interleaved = self.config, inputs.embeddings, inputs.interleaved
        rows = jnp.arange(x.shape[0])[:, None]
        slots = None if cache is None else cache.used[:, None] + jnp.arange(x.shape[1])
        put = lambda old, new: new if cache is None else old.at[rows, slots].set(new, mode="drop")
        k_positions = put(cache and cache.positions, positions)
        k_segments = put(cache and cache.segments, segments)
        mask_of = _masks(config, inputs, positions, k_positions, segments, k_segments, same_tokens=cache is None)
        angles = alibi = None
        if isinstance(config.positions, RopeConfig):
            angles = rotary_angles(config.positions, config.block.head_width, positions, segments)
        elif isinstance(config.positions, AlibiConfig):
            alibi = alibi_of(positions, k_positions, config.block.heads, config.positions.max_bias)
        elif isinstance(config.positions, LearnedPositionsConfig):
            table = constrain(self.position_embedding, "positions", None)
            x = x + jnp.take(table, positions + config.positions.offset, axis=0).astype(x.dtype)
            x = constrain(x, "batch", "length", None)
        if config.token_types:
            x = x + self.type_embedding[0].astype(x.dtype)
        if config.embedding_norm:
            x = self.embedding_norm(x)

        def layer(
            carry: tuple[Array, Any], indexed: tuple[Any, ...], between: Callable[[Array], Array] | None = None
        ) -> tuple[tuple[Array, Any], tuple[Any, Any]]:
            (x, held), (index, params, own) = carry, indexed

            def attention_of(q: Array, k: Array, v: Array) -> tuple[Array, Any]:
                if angles is not None:
                    q, k = rotate(q, *angles), rotate(k, *angles)
                if cache is None:
                    return attend(q, k, v, mask_of(index), alibi), (k, v)
                at = (rows, slice(None), slots)
                if held is not None:
                    # The whole stack is carried and some places of it written, so that XLA updates it in place.
                    new = tuple(_write(old, part, (index, *at)) for old, part in zip(held, (k, v), strict=True))
                    seen = tuple(part[index] for part in new)
                else:
                    seen = new = tuple(_write(old, part, at) for old, part in zip(own, (k, v), strict=True))
                return attend(q, *(part.astype(q.dtype).swapaxes(1, 2) for part in seen), mask_of(index), alibi), new

            x, new, aux = self.block.apply({"params": params}, x, attention_of, between)
            x = constrain(x, "batch", "length", None)
            if held is not None:
                return (x, new), (None, aux)
            if cache is None:
                new = tuple(part.swapaxes(1, 2) for part in new) if return_cache else None
            return (x, None), (new, aux)

        one_by_one = isinstance(self.layers, tuple)
        stack = None if cache is None or one_by_one else (cache.keys, cache.values)
        own = tuple(zip(cache.keys, cache.values, strict=True)) if cache is not None and one_by_one else None
        (x, stack), (kept, aux), collected = run_layers((x, stack), self.layers, own, layer, interleaved, self.remat)
        if cache is not None or return_cache:
            keys, values = stack if stack is not None else (zip(*kept, strict=True) if one_by_one else kept)
            keys, values = (tuple(part) if one_by_one else part for part in (keys, values))
            used = jnp.sum(segments > 0, axis=1, dtype=jnp.int32) + (0 if cache is None else cache.used)
            cache = Cache(keys, values, k_positions, k_segments, used)
        return Output(self.final_norm(x) if config.final_norm else x, cache, collected, aux)


def _write(old: Array, new: Array, at: tuple[Any, ...]) -> Array:
    """Keys or values [B, T, K, H] into a cache; what has no slot is dropped."""
    return old.at[at].set(new.astype(old.dtype), mode="drop")


def _masks(config: DecoderConfig, inputs: LanguageInputs, *places: Array, same_tokens: bool) -> Callable[[Any], Mask]:
    """The number of a layer -> its mask, from the arguments of `causal_mask`."""
    prefix = dict(q_prefix_end=inputs.prefix_end, q_prefix_segments=inputs.prefix_segments)
    of = functools.partial(causal_mask, *places, **prefix, same_tokens=same_tokens)
    if not isinstance(config.window, tuple):
        mask = of(window=config.window)
        return lambda index: mask
    if len(config.window) != config.layers:
        raise ValueError(f"window: {len(config.window)} windows for {config.layers} layers; expected one each")
    windows = jnp.asarray([jnp.iinfo(jnp.int32).max if window is None else window for window in config.window])
    return lambda index: of(window=windows[index])
