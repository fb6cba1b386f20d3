"""Scaled dot-product attention.

Axis letters: B batch, T queries, S keys, N query heads, K key/value heads (N = K * G, G queries share a key), H head width.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

Array = jax.Array


def attention_weights(
    q: Array, k: Array, mask: Array | None = None, bias: Array | None = None, scale: float | None = None
) -> Array:
    """Softmax of q k^T, in float32.

    Args:
      q: [B, T, N, H].
      k: [B, S, K, H] with N a multiple of K (grouped-query attention, Ainslie et al. 2023).
      mask: [B or 1, T, S] bool, True where the query may see the key. A query that sees no key has all weights exactly 0.
      bias: [N, 1 or T, S] or [B, N, T, S], added to the logits (ALiBi).
      scale: of the logits; None: 1 / sqrt(H).

    Returns:
      [B, K, G, T, S] float32.
    """
    groups = q.shape[2] // k.shape[2]
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    q = (q * scale).reshape(*q.shape[:2], k.shape[2], groups, q.shape[-1])
    logits = jnp.einsum("BTKGH,BSKH->BKGTS", q, k, preferred_element_type=jnp.float32)
    if bias is not None:
        bias = bias[None] if bias.ndim == 3 else bias
        logits = logits + bias.reshape(bias.shape[0], k.shape[2], groups, *bias.shape[2:])
    if mask is None:
        return jax.nn.softmax(logits, axis=-1)
    mask = mask[:, None, None]
    logits = jnp.where(mask, logits, jnp.finfo(jnp.float32).min)
    # Without the second `where` a row that sees nothing would attend uniformly to everything.
    return jnp.where(mask, jax.nn.softmax(logits, axis=-1), 0.0)


def attend(
    q: Array, k: Array, v: Array, mask: Array | None = None, bias: Array | None = None, scale: float | None = None
) -> Array:
    """Attention of `q` over `k`, `v`; arguments as in `attention_weights`.

    Returns:
      [B, T, N, H] in the type of `v`. A query that sees no key gets exactly 0.
    """
    weights = attention_weights(q, k, mask, bias, scale).astype(v.dtype)
    return jnp.einsum("BKGTS,BSKH->BTKGH", weights, v).reshape(*q.shape[:3], v.shape[-1])
