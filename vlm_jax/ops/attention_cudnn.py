"""cuDNN's FlashAttention on GPUs of NVIDIA, through `jax.nn.dot_product_attention`."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from vlm_jax.ops.masks import Alibi, Mask
from vlm_jax.sharding import target_platform

Array = jax.Array

WIDEST, EVERY = 128, 8  # the width of a head: at most, and a multiple of


def unsupported_reason(q: Array, k: Array, v: Array, mask: Mask | None, alibi: Alibi | None) -> str:
    """Why this kernel does not serve a call; "" if it does."""
    platform = target_platform()
    if platform != "gpu":
        return f"it runs on GPUs, and the mesh is of {platform}"
    if {x.dtype for x in (q, k, v)} - {jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float16)}:
        return f"{q.dtype} queries: cuDNN takes bfloat16 and float16"
    if q.shape[-1] > WIDEST or q.shape[-1] % EVERY or v.shape[-1] != q.shape[-1]:
        return f"heads of {q.shape[-1]}: cuDNN takes multiples of {EVERY} up to {WIDEST}"
    if q.shape[1] % 2 or k.shape[1] % 2:
        return f"{q.shape[1]} queries and {k.shape[1]} keys: the gradient wants even numbers"
    return ""


def attend(q: Array, k: Array, v: Array, mask: Mask | None = None, alibi: Alibi | None = None) -> Array:
    """See `ops.attention.attend`."""
    bias = None if alibi is None else alibi.dense().astype(q.dtype)
    if mask is None:
        return jax.nn.dot_product_attention(q, k, v, bias, implementation="cudnn")
    visible = mask.dense()
    y = jax.nn.dot_product_attention(q, k, v, bias, visible[:, None], implementation="cudnn")
    return jnp.where(visible.any(axis=-1)[..., None, None], y, 0)
