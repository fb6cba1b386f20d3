"""Which query may see which key, from the positions and segments of the two.

Axis letters: B batch, T queries, S keys, M image slots of a row, N heads.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

Array = jax.Array


def causal_mask(
    q_positions: Array,
    k_positions: Array,
    q_segments: Array,
    k_segments: Array,
    window: int | Array | None = None,
    k_prefix: Array | None = None,
) -> Array:
    """A token sees its own segment up to itself, and with a window at most `window` positions, itself included.

    Positions, not places in the row, are compared, so one rule serves packed rows, left padding and the KV cache::

        segments 1 1 2 2 0        0 | 1 0 0 0 0
        positions 0 1 0 1 0       1 | 1 1 0 0 0
                                  0 | 0 0 1 0 0
                                  1 | 0 0 1 1 0
                                  - | 0 0 0 0 0   (segment 0 is padding: it sees nothing and nothing sees it)

    Args:
      q_positions, q_segments: [B, T] int32.
      k_positions, k_segments: [B, S] int32.
      window: an array [] where it is one of several that are scanned.
      k_prefix: [B, S] bool, keys that the tokens before them see too: the prefix of a prefix-LM (Raffel et al. 2020).

    Returns:
      [B, T, S] bool.
    """
    distance = q_positions[:, :, None] - k_positions[:, None, :]
    same = (q_segments[:, :, None] == k_segments[:, None, :]) & (k_segments[:, None, :] > 0)
    earlier = distance >= 0
    seen = same & (earlier if k_prefix is None else earlier | k_prefix[:, None, :])
    return seen if window is None else seen & (distance < window)


def media_mask(media_first: Array, media_last: Array, slots: int, mode: str) -> Array:
    """Which image slots a token sees (Flamingo, section 3.1.3; the table of slots is in `data/batch.py`).

    With images at places 2 and 5 of 8 tokens::

        last          00 00 10 10 10 01 01 01
        all_previous  00 00 10 10 10 11 11 11

    Args:
      media_first, media_last: [B, T] int32, slots counted from 1, 0 for none.
      slots: M.
      mode: "last", "all_previous", or "all_previous_uniform": a token before the first image sees those of its row.

    Returns:
      [B, T, M] bool.
    """
    slot = jnp.arange(1, slots + 1)
    if mode == "last":
        return slot == media_last[..., None]
    previous = (media_first[..., None] <= slot) & (slot <= media_last[..., None])
    if mode == "all_previous":
        return previous
    if mode == "all_previous_uniform":
        of_row = slot <= jnp.max(media_last, axis=1)[:, None, None]
        return jnp.where(media_last[..., None] == 0, of_row, previous)
    raise ValueError(f"media mode {mode!r}: expected 'last', 'all_previous' or 'all_previous_uniform'")


def alibi_slopes(heads: int, max_bias: float) -> list[float]:
    """The slopes of ALiBi (Press et al. 2022) for any number of heads, in MPT's order.

    For a power of two they are 2^(-max_bias i / heads), i = 1..heads; otherwise those of the next power of two, the odd
    places first.
    """
    power = 2 ** math.ceil(math.log2(heads))
    slopes = [2 ** (-max_bias * i / power) for i in range(1, power + 1)]
    return slopes if power == heads else (slopes[1::2] + slopes[::2])[:heads]


def alibi_bias(q_positions: Array, k_positions: Array, heads: int, max_bias: float) -> Array:
    """-slope * distance: [B, N, T, S] float32."""
    distance = (q_positions[:, :, None] - k_positions[:, None, :]).astype(jnp.float32)
    slopes = jnp.asarray(alibi_slopes(heads, max_bias), jnp.float32)
    return -slopes[None, :, None, None] * distance[:, None]


def unlearned(segments: Array, weights: Array) -> Array:
    """The tokens of each segment before the first that is learned: [B, T] bool.

    With weights at the places that predict, the token after a place of weight is the first learned one::

        segments 1 1 1 1 2 2 2
        weights  0 1 1 0 1 1 0
                 1 1 0 0 1 0 0

    Args:
      segments: [B, T] int32.
      weights: [B, T] float32, of the prediction made at each place.
    """
    before = jnp.pad(weights[:, :-1] > 0, ((0, 0), (1, 0)))
    same = segments == jnp.pad(segments[:, :-1], ((0, 0), (1, 0)))
    count = jnp.cumsum(before & same, axis=1)
    # What was counted up to a segment's first token is not its own.
    start = jax.lax.cummax(jnp.where(same, 0, count), axis=1)
    return (count == start) & (segments > 0)
