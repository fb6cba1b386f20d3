"""Splash attention: FlashAttention (Dao et al. 2022) on TPUs, JAX's Pallas kernel, which leaves out blocks that nothing sees.

Its masks are compiled in: causal, with a window, or none; what depends on the batch is said by segments. So it serves a `Mask`
with a `rule`, and no other.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from vlm_jax.ops.masks import Alibi, Mask
from vlm_jax.sharding import place, target_platform

Array = jax.Array

BLOCK = 512  # queries and keys at once, at most; a number of lanes
LANES = 128
LEAST = 512  # keys from which on it is taken: of fewer, XLA makes all logits faster than blocks are set up
NOTHING, PADDING = 0, -1  # the segments of queries that see no key, and of keys that no query sees


def unsupported_reason(q: Array, k: Array, v: Array, mask: Mask | None, alibi: Alibi | None) -> str:
    """Why this kernel does not serve a call; "" if it does."""
    platform = target_platform()
    if platform != "tpu":
        return f"it runs on TPUs, and the mesh is of {platform}"
    return _unsupported_call(q, k, v, mask, alibi)


def _unsupported_call(q: Array, k: Array, v: Array, mask: Mask | None, alibi: Alibi | None) -> str:
    if alibi is not None:
        return "linear biases (ALiBi)"
    if mask is not None and not mask.rule:
        return "a mask that is known from arrays alone: a prefix, a cache, or windows that differ between layers"
    if k.shape[1] < LEAST:
        return f"{k.shape[1]} keys are fewer than {LEAST}"
    mesh = jax.sharding.get_abstract_mesh()
    for name, size in {} if mesh.empty else {"heads": q.shape[2], "kv_heads": k.shape[2]}.items():
        if size % mesh.shape["tensor"]:
            return f"{size} {name} do not divide into tensor={mesh.shape['tensor']} shards"
    return ""


def attend(
    q: Array, k: Array, v: Array, mask: Mask | None = None, alibi: Alibi | None = None, *, interpret: bool = False
) -> Array:
    """See `ops.attention.attend`.

    Args:
      interpret: run the kernel step by step with XLA's operations, on any device.
    """
    rule = "keys" if mask is None else mask.rule
    of_queries, of_keys = _segments(q, k, mask)
    run = functools.partial(_of_shard, rule=rule, window=None if mask is None else mask.window, interpret=interpret)
    mesh = jax.sharding.get_abstract_mesh()
    if not mesh.empty and mesh.size > 1:
        spec = lambda x, *names: place(names, x.shape, mesh).spec
        of_rows = spec(of_queries, "batch", "length"), spec(of_keys, "batch", "length")
        of_heads = spec(q, "batch", "length", "heads", "head")
        of_kv = spec(k, "batch", "length", "kv_heads", "head")
        run = jax.shard_map(run, in_specs=(of_heads, of_kv, of_kv, *of_rows), out_specs=of_heads, check_vma=False)
    y = run(q, k, v, of_queries, of_keys)
    if rule != "causal":
        return y
    # Padding sees itself in the kernel, so that its sums are not 0.
    return jnp.where((of_queries != NOTHING)[..., None, None], y, 0)


def _segments(q: Array, k: Array, mask: Mask | None) -> tuple[Array, Array]:
    """[B, T] and [B, S] int32: a query may see the keys of its own number. `NOTHING` is also that of the keys put behind."""
    over = lambda x, like: jnp.broadcast_to(x, like.shape[:2])
    if mask is None:
        return jnp.ones(q.shape[:2], jnp.int32), jnp.ones(k.shape[:2], jnp.int32)
    if mask.rule == "causal":
        return mask.q_segments, mask.k_segments
    if mask.rule == "keys":
        seen = (mask.first <= mask.places) & (mask.places <= mask.last)
        return jnp.ones(q.shape[:2], jnp.int32), over(jnp.where(seen, 1, PADDING), k)
    return over(mask.last, q), over(mask.places, k)


def _of_shard(
    q: Array, k: Array, v: Array, of_queries: Array, of_keys: Array, *, rule: str, window: int | None, interpret: bool
) -> Array:
    """Rows and heads that one device has: [B, T, N, H] over [B, S, K, H]."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash

    tokens, length = q.shape[1], k.shape[1]
    # A key more than there are: what sees no other sees it, whose value is 0.
    keys = tokens if rule == "causal" else length + 1
    pad_q, pad_k = -tokens % _block(tokens), -keys % _block(keys) + keys - length
    wide = lambda x, count: jnp.pad(x, ((0, 0), (0, count), (0, 0), (0, 0))).swapaxes(1, 2)  # [B, N, T, H]
    q = wide(q * jnp.asarray(q.shape[-1] ** -0.5, q.dtype), pad_q)
    ids = splash.SegmentIds(
        q=jnp.pad(of_queries, ((0, 0), (0, pad_q)), constant_values=NOTHING),
        kv=jnp.pad(of_keys, ((0, 0), (0, pad_k)), constant_values=NOTHING),
    )
    kernel = _kernel(q.shape[1], q.shape[2], length + pad_k, rule, window, interpret)
    y = jax.vmap(kernel)(q, wide(k, pad_k), wide(v, pad_k), ids)
    return y.swapaxes(1, 2)[:, :tokens].astype(v.dtype)


def _kernel(heads: int, queries: int, keys: int, rule: str, window: int | None, interpret: bool) -> Any:
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    shape = (queries, keys)
    if rule != "causal":
        one = masks.FullMask(shape)
    elif window is None:
        one = masks.CausalMask(shape)
    else:
        one = masks.LocalMask(shape, (window - 1, 0), 0)
    block_q, block_k = _block(queries), _block(keys)
    names = [field.name for field in dataclasses.fields(splash.BlockSizes) if field.name.startswith("block_")]
    sizes = splash.BlockSizes(**{name: block_q if name.startswith("block_q") else block_k for name in names})
    return splash.make_splash_mha(
        mask=masks.MultiHeadMask([one] * heads), block_sizes=sizes, head_shards=1, q_seq_shards=1, interpret=interpret
    )


def _block(count: int) -> int:
    """Queries or keys of a block: `BLOCK`, or of fewer all of them, as whole lanes."""
    return min(BLOCK, -(-count // LANES) * LANES)
