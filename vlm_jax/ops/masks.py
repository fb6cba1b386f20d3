"""Which query may see which key, from the positions and segments of the two."""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

import jax
import jax.numpy as jnp

Array = jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Mask:
    """Which query sees which key: those of its own segment whose place lies between the query's `first` and `last`.

    causal                      place = position of the key     first = 0                  last = position of the query
    sliding window of W                                         first = position - W + 1
    prefix-LM                                                                              last = end of the prompt
    media by cross-attention    place = slot of the key         first, last = slots that the token may see

    Sequences that begin alike may share the keys of their prefix, a segment of its own that the queries of each also see.
    """

    places: Array  # [B or 1, S] int32
    first: Array  # [B or 1, T or 1] int32
    last: Array  # [B or 1, T or 1] int32
    q_segments: Array | None = None  # [B, T] int32; None, as both are: segments do not count
    k_segments: Array | None = None  # [B, S] int32; 0: padding, which nothing sees
    q_prefix_segments: Array | None = None  # [B, T] int32, the segment of the shared prefix; 0: none; None: no query has one
    # What is known of the arrays before they are there, for kernels whose masks are compiled in. "keys": every query sees the
    # same keys. "equal": it sees those whose place is its `first` and its `last`. "causal": queries and keys are the same
    # tokens, those of a segment lie one after the other, and each sees those up to itself, of `window`. "": nothing.
    rule: Literal["", "keys", "equal", "causal"] = dataclasses.field(default="", metadata=dict(static=True))
    window: int | None = dataclasses.field(default=None, metadata=dict(static=True))

    @classmethod
    def from_keys(cls, visible: Array) -> Mask:
        """Every query sees the same keys: `visible` [B or 1, S] bool."""
        zero = jnp.zeros((1, 1), jnp.int32)
        return cls(places=jnp.where(visible, 0, 1), first=zero, last=zero, rule="keys")

    def dense(self) -> Array:
        """[B or 1, T or 1, S] bool."""
        places = self.places[:, None, :]
        visible = (self.first[:, :, None] <= places) & (places <= self.last[:, :, None])
        if self.k_segments is None:
            return visible
        keys = self.k_segments[:, None, :]
        same = self.q_segments[:, :, None] == keys
        if self.q_prefix_segments is not None:
            same |= self.q_prefix_segments[:, :, None] == keys
        return visible & same & (keys > 0)

    def padded(self, tokens: int, queries: int, keys: int) -> Mask:
        """With so many more queries than T, and so many keys that nothing sees, behind the others.

        Args:
          tokens: T.
        """
        wider = lambda x, count, value=0: jnp.pad(x, ((0, 0), (0, count)), constant_values=value)
        wide = lambda x: wider(jnp.broadcast_to(x, (x.shape[0], tokens)), queries)
        return Mask(
            places=wider(self.places, keys, jnp.iinfo(jnp.int32).min),
            first=wide(self.first),
            last=wide(self.last),
            q_segments=None if self.q_segments is None else wider(self.q_segments, queries),
            k_segments=None if self.k_segments is None else wider(self.k_segments, keys),
            q_prefix_segments=None if self.q_prefix_segments is None else wider(self.q_prefix_segments, queries),
        )


def causal_mask(
    q_positions: Array,
    k_positions: Array,
    q_segments: Array,
    k_segments: Array,
    window: int | Array | None = None,
    q_prefix_end: Array | None = None,
    *,
    q_prefix_segments: Array | None = None,
    same_tokens: bool = False,
) -> Mask:
    """A token sees its own segment up to itself, and with a window at most `window` positions, itself included.

    Positions, not places in the row, are compared, so one rule serves packed rows, padding and the KV cache::

        segments 1 1 2 2 0        0 | 1 0 0 0 0
        positions 0 1 0 1 0       1 | 1 1 0 0 0
                                  0 | 0 0 1 0 0
                                  1 | 0 0 1 1 0
                                  - | 0 0 0 0 0   (segment 0 is padding: it sees nothing and nothing sees it)

    Args:
      q_positions, q_segments: [B, T] int32.
      k_positions, k_segments: [B, S] int32.
      window: an array [] where it is one of several that are scanned.
      q_prefix_end: [B, T] int32, the last position a query sees: of a prefix-LM (Raffel et al. 2020) the end of the prompt that
        the query belongs to. None: its own position.
      q_prefix_segments: [B, T] int32, the segment that holds the prefix of the query's sequence, which goes on counting
        positions where that ends; see `batch.py`.
      same_tokens: whether queries and keys are the same tokens, those of a segment one after the other.
    """
    traced = window is not None and not isinstance(window, int)
    plain = same_tokens and not traced and q_prefix_end is None and q_prefix_segments is None
    return Mask(
        places=k_positions,
        first=jnp.zeros_like(q_positions) if window is None else q_positions - window + 1,
        last=q_positions if q_prefix_end is None else q_prefix_end,
        q_segments=q_segments,
        k_segments=k_segments,
        q_prefix_segments=q_prefix_segments,
        rule="causal" if plain else "",
        window=window if plain else None,
    )


def media_mask(
    media_first: Array, media_last: Array, slots: int, mode: str, *, segments: Array | None = None, tokens: int = 1
) -> Mask:
    """Which image slots a token sees (Flamingo, section 3.1.3; the table of slots is in `batch.py`).

    With images at places 2 and 5 of 8 tokens::

        last          00 00 10 10 10 01 01 01
        all_previous  00 00 10 10 10 11 11 11

    Args:
      media_first, media_last: [B, T] int32, slots counted from 1, 0 for none.
      slots: M.
      mode: "last", "all_previous", or "all_previous_uniform": a token before the first image sees those of its segment.
      segments: [B, T] int32; None: a row is one segment.
      tokens: how many keys a slot has, one after the other.
    """
    places = jnp.repeat(jnp.arange(1, slots + 1, dtype=jnp.int32), tokens)[None]
    if mode == "last":
        return Mask(places=places, first=media_last, last=media_last, rule="equal")
    if mode == "all_previous":
        return Mask(places=places, first=media_first, last=media_last)
    if mode == "all_previous_uniform":
        segments = jnp.zeros_like(media_last) if segments is None else segments
        count = media_last.shape[1] + 1
        greatest = jax.vmap(lambda last, of: jax.ops.segment_max(last, of, count)[of])(media_last, segments)
        all_of_segment = jnp.where(media_first > 0, greatest, 0)
        return Mask(places=places, first=media_first, last=jnp.where(media_last == 0, all_of_segment, media_last))
    raise ValueError(f"media mode {mode!r}: expected 'last', 'all_previous' or 'all_previous_uniform'")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Alibi:
    """Attention with linear biases (Press et al. 2022): minus a head's slope times the distance."""

    slopes: Array  # [N] float32
    q_positions: Array  # [B, T] int32
    k_positions: Array  # [B, S] int32

    def dense(self) -> Array:
        """[B, N, T, S] float32."""
        distance = (self.q_positions[:, :, None] - self.k_positions[:, None, :]).astype(jnp.float32)
        return -self.slopes[None, :, None, None] * distance[:, None]

    def padded(self, queries: int, keys: int) -> Alibi:
        """With so many more queries and keys behind the others."""
        pad = lambda x, count: jnp.pad(x, ((0, 0), (0, count)))
        return dataclasses.replace(self, q_positions=pad(self.q_positions, queries), k_positions=pad(self.k_positions, keys))


def alibi_slopes(heads: int, max_bias: float) -> list[float]:
    """The slopes of ALiBi (Press et al. 2022) for any number of heads, in MPT's order.

    For a power of two they are 2^(-max_bias i / heads), i = 1..heads; otherwise those of the next power of two, the odd
    places first.
    """
    power = 2 ** math.ceil(math.log2(heads))
    slopes = [2 ** (-max_bias * i / power) for i in range(1, power + 1)]
    return slopes if power == heads else (slopes[1::2] + slopes[::2])[:heads]


def alibi_of(q_positions: Array, k_positions: Array, heads: int, max_bias: float) -> Alibi:
    return Alibi(
        slopes=jnp.asarray(alibi_slopes(heads, max_bias), jnp.float32), q_positions=q_positions, k_positions=k_positions
    )
