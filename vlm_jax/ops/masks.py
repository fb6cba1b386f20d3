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
    q_prefix_end: Array | None = None,
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
      q_prefix_end: [B, T] int32, the last position a query sees: of a prefix-LM (Raffel et al. 2020) the end of the prompt that
        the query belongs to. None: its own position.

    Returns:
      [B, T, S] bool.
    """
    distance = q_positions[:, :, None] - k_positions[:, None, :]
    same = (q_segments[:, :, None] == k_segments[:, None, :]) & (k_segments[:, None, :] > 0)
    last = q_positions if q_prefix_end is None else q_prefix_end
    seen = same & (k_positions[:, None, :] <= last[:, :, None])
    return seen if window is None else seen & (distance < window)


def media_mask(media_first: Array, media_last: Array, slots: int, mode: str, *, segments: Array | None = None) -> Array:
    """Which image slots a token sees (Flamingo, section 3.1.3; the table of slots is in `data/batch.py`).

    With images at places 2 and 5 of 8 tokens::

        last          00 00 10 10 10 01 01 01
        all_previous  00 00 10 10 10 11 11 11

    Args:
      media_first, media_last: [B, T] int32, slots counted from 1, 0 for none.
      slots: M.
      mode: "last", "all_previous", or "all_previous_uniform": a token before the first image sees those of its segment.
      segments: [B, T] int32; None: a row is one segment.

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
        segments = jnp.zeros_like(media_last) if segments is None else segments
        count = media_last.shape[1] + 1
        greatest = jax.vmap(lambda last, of: jax.ops.segment_max(last, of, count)[of])(media_last, segments)
        of_segment = (media_first[..., None] <= slot) & (slot <= greatest[..., None]) & (media_first[..., None] > 0)
        return jnp.where(media_last[..., None] == 0, of_segment, previous)
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
