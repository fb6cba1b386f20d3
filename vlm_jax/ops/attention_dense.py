"""Attention by one softmax over all keys, in plain XLA: the logits [B, N, T, S] are made whole."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from vlm_jax.ops.masks import Alibi, Mask

Array = jax.Array

MOST = 2048 * 2048  # logits of a head; training keeps them


def unsupported_reason(q: Array, k: Array, v: Array, mask: Mask | None, alibi: Alibi | None) -> str:
    """Why this kernel does not serve a call; "" if it does."""
    logits = q.shape[1] * k.shape[1]
    return f"{logits:,} logits a head are more than {MOST:,}" if logits > MOST else ""


def _exponentials(q: Array, k: Array, mask: Array | None, bias: Array | None) -> tuple[Array, Array]:
    """Unnormalised softmax of q k^T and what to divide it by, float32: [B, K, G, T, S] and [B, K, G, T, 1].

    Args:
      mask: [B or 1, T or 1, S] bool; bias: [B or 1, N, T or 1, S] float32.
    """
    batch, queries, heads, width = q.shape
    groups = heads // k.shape[2]
    # Heads in front and the queries of a group folded together: one plain batched matrix product on every backend.
    q = q.reshape(batch, queries, k.shape[2], groups, width).transpose(0, 2, 3, 1, 4)
    q = (q * width**-0.5).reshape(batch, k.shape[2], groups * queries, width)
    logits = jnp.matmul(q, k.transpose(0, 2, 3, 1), preferred_element_type=jnp.float32)
    logits = logits.reshape(batch, k.shape[2], groups, queries, -1)
    if bias is not None:
        logits = logits + bias.reshape(bias.shape[0], k.shape[2], groups, *bias.shape[2:])
    if mask is not None:
        logits = jnp.where(mask[:, None, None], logits, -jnp.inf)
    top = jax.lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True))
    # A query that sees no key has only -inf: without the bound, exp(-inf + inf) is NaN.
    weights = jnp.exp(logits - jnp.maximum(top, jnp.finfo(jnp.float32).min))
    sums = jnp.sum(weights, axis=-1, keepdims=True)
    # 1 and not a tiny number where nothing is seen: the gradient of a division by it overflows.
    return weights, jnp.where(sums > 0, sums, 1.0)


def attention_weights(q: Array, k: Array, mask: Mask | None = None, alibi: Alibi | None = None) -> Array:
    """Softmax of q k^T / sqrt(H): [B, N, T, S] float32. Arguments as in `ops.attention.attend`."""
    weights, sums = _exponentials(q, k, *_whole(mask, alibi))
    return (weights / sums).reshape(q.shape[0], q.shape[2], q.shape[1], -1)


def attend(q: Array, k: Array, v: Array, mask: Mask | None = None, alibi: Alibi | None = None) -> Array:
    """See `ops.attention.attend`."""
    weights, sums = _exponentials(q, k, *_whole(mask, alibi))
    batch, kv_heads, groups, queries, _ = weights.shape
    weights = weights.astype(v.dtype).reshape(batch, kv_heads, groups * queries, -1)
    y = jnp.matmul(weights, v.transpose(0, 2, 1, 3), preferred_element_type=jnp.float32)
    # The sums divide the result and not the weights: H numbers a query instead of S.
    y = y.reshape(batch, kv_heads, groups, queries, -1) / sums
    return y.astype(v.dtype).transpose(0, 3, 1, 2, 4).reshape(batch, queries, -1, v.shape[-1])


def _whole(mask: Mask | None, alibi: Alibi | None) -> tuple[Array | None, Array | None]:
    return None if mask is None else mask.dense(), None if alibi is None else alibi.dense()
