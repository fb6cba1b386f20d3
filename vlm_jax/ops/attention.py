"""Scaled dot-product attention: one function, and behind it whatever serves a call best.

A kernel is a file with `attend` and `unsupported_reason` (why it does not serve a call, "" if it does). The first of `KERNELS`
that serves is taken; the last one serves everything.
"""

from __future__ import annotations

import jax

from vlm_jax.ops import attention_chunked, attention_cudnn, attention_dense, attention_splash
from vlm_jax.ops.masks import Alibi, Mask

Array = jax.Array

KERNELS = (attention_splash, attention_cudnn, attention_dense, attention_chunked)


def attend(q: Array, k: Array, v: Array, mask: Mask | None = None, alibi: Alibi | None = None) -> Array:
    """Attention of `q` over `k`, `v`.

    Args:
      q: [B, T, N, H].
      k, v: [B, S, K, H] with N a multiple of K (grouped-query attention, Ainslie et al. 2023).
      mask: None: every query sees every key.
      alibi: what is added to the logits.

    Returns:
      [B, T, N, H] in the type of `v`. A query that sees no key gets exactly 0.
    """
    kernel = next(kernel for kernel in KERNELS if not kernel.unsupported_reason(q, k, v, mask, alibi))
    return kernel.attend(q, k, v, mask, alibi)
