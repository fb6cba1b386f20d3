"""Attention by chunks of keys and queries, in plain XLA: memory grows with T and not with T * S, forwards and backwards.

The forward pass is Rabe & Staats' (2021), a running softmax over chunks of keys. The backward pass is FlashAttention's (Dao et
al. 2022, algorithm 4): a chunk's weights are made again from the logarithms of the sums.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from vlm_jax.ops.masks import Alibi, Mask

Array = jax.Array

QUERY_CHUNK, KEY_CHUNK = 512, 1024  # of a chunk

_product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)


def unsupported_reason(q: Array, k: Array, v: Array, mask: Mask | None, alibi: Alibi | None) -> str:
    """Why this kernel does not serve a call; "" if it does. It serves every one."""
    return ""


def attend(q: Array, k: Array, v: Array, mask: Mask | None = None, alibi: Alibi | None = None) -> Array:
    """See `ops.attention.attend`."""
    tokens, length, width = q.shape[1], k.shape[1], q.shape[-1]
    more = (-tokens % QUERY_CHUNK, -length % KEY_CHUNK)
    if mask is None:
        mask = Mask.from_keys(jnp.ones((1, length), bool))
    padded = lambda x, count: jnp.pad(x, ((0, 0), (0, count), (0, 0), (0, 0)))
    grouped = padded(q * width**-0.5, more[0])
    grouped = grouped.reshape(*grouped.shape[:2], k.shape[2], -1, width).transpose(0, 2, 3, 1, 4)  # [B, K, G, T, H]
    keys, values = (padded(x, more[1]).transpose(0, 2, 1, 3) for x in (k, v))  # [B, K, S, H]
    y = _attend(grouped, keys, values, mask.padded(tokens, *more), None if alibi is None else alibi.padded(*more))
    y = y[..., :tokens, :].astype(v.dtype).transpose(0, 3, 1, 2, 4)
    return y.reshape(*q.shape[:3], v.shape[-1])


@jax.custom_vjp
def _attend(q: Array, k: Array, v: Array, mask: Mask, alibi: Alibi | None) -> Array:
    return _forward(q, k, v, mask, alibi)[0]


def _forward(q: Array, k: Array, v: Array, mask: Mask, alibi: Alibi | None) -> tuple[Array, tuple[Any, ...]]:
    """The output [B, K, G, T, H] float32, and what the backward pass needs."""
    by_key = (_split(k, KEY_CHUNK, axis=2), _split(v, KEY_CHUNK, axis=2), _key_side(mask, alibi))

    def of_queries(chunk: tuple[Array, Any]) -> tuple[Array, Array]:
        q, query_side = chunk

        def add(carry: tuple[Array, Array, Array], chunk: tuple[Array, Array, Any]) -> tuple[tuple[Array, ...], None]:
            top, sums, y = carry
            k, v, key_side = chunk
            logits = _logits(q, k, query_side, key_side, alibi)
            higher = jnp.maximum(top, jnp.max(logits, axis=-1))
            # Where nothing is seen yet the top is -inf: without the bound, exp(-inf + inf) is NaN.
            bound = jnp.maximum(higher, jnp.finfo(jnp.float32).min)
            weights, fade = jnp.exp(logits - bound[..., None]), jnp.exp(top - bound)
            seen = _product("BKGTS,BKSH->BKGTH", weights.astype(v.dtype), v)
            return (higher, sums * fade + jnp.sum(weights, axis=-1), y * fade[..., None] + seen), None

        empty = (jnp.full(q.shape[:-1], -jnp.inf), jnp.zeros(q.shape[:-1]), jnp.zeros((*q.shape[:-1], v.shape[-1])))
        (top, sums, y), _ = jax.lax.scan(add, empty, by_key)
        total = jnp.where(sums > 0, sums, 1.0)
        # Of a query that sees nothing, infinity: its weights are 0 in the backward pass too.
        return y / total[..., None], jnp.where(sums > 0, top + jnp.log(total), jnp.inf)

    y, log_sums = jax.lax.map(of_queries, (_split(q, QUERY_CHUNK, axis=3), _query_side(mask, alibi)))
    y, log_sums = _join(y, axis=3), _join(log_sums, axis=3)
    return y, (q, k, v, mask, alibi, y, log_sums)


def _backward(kept: tuple[Any, ...], dy: Array) -> tuple[Array, Array, Array, None, None]:
    q, k, v, mask, alibi, y, log_sums = kept
    parts = (q, dy.astype(v.dtype), log_sums, jnp.sum(dy * y, axis=-1))
    by_query = (*(_split(x, QUERY_CHUNK, axis=3) for x in parts), _query_side(mask, alibi))

    def of_keys(dq: Array, chunk: tuple[Array, Array, Any]) -> tuple[Array, tuple[Array, Array]]:
        k, v, key_side = chunk

        def add(carry: tuple[Array, Array], chunk: tuple[Any, ...]) -> tuple[tuple[Array, Array], Array]:
            dk, dv = carry
            dq, q, dy, log_sum, ones, query_side = chunk
            weights = jnp.exp(_logits(q, k, query_side, key_side, alibi) - log_sum[..., None])
            dv = dv + _product("BKGTS,BKGTH->BKSH", weights.astype(v.dtype), dy)
            dweights = _product("BKGTH,BKSH->BKGTS", dy, v)
            dlogits = (weights * (dweights - ones[..., None])).astype(q.dtype)
            return (dk + _product("BKGTS,BKGTH->BKSH", dlogits, q), dv), dq + _product("BKGTS,BKSH->BKGTH", dlogits, k)

        (dk, dv), dq = jax.lax.scan(add, (jnp.zeros(k.shape), jnp.zeros(v.shape)), (dq, *by_query))
        return dq, (dk, dv)

    by_key = (_split(k, KEY_CHUNK, axis=2), _split(v, KEY_CHUNK, axis=2), _key_side(mask, alibi))
    dq, (dk, dv) = jax.lax.scan(of_keys, jnp.zeros(by_query[0].shape), by_key)
    return _join(dq, axis=3).astype(q.dtype), _join(dk, axis=2).astype(k.dtype), _join(dv, axis=2).astype(v.dtype), None, None


_attend.defvjp(_forward, _backward)


def _logits(q: Array, k: Array, query_side: Any, key_side: Any, alibi: Alibi | None) -> Array:
    """[B, K, G, T, S] float32 of a chunk of queries and a chunk of keys; -inf where a key is not seen."""
    logits = _product("BKGTH,BKSH->BKGTS", q, k)
    if alibi is not None:
        here = dataclasses.replace(alibi, q_positions=query_side["q_positions"], k_positions=key_side["k_positions"])
        bias = here.dense()
        logits = logits + bias.reshape(bias.shape[0], *q.shape[1:3], *bias.shape[2:])
    names = [field.name for field in dataclasses.fields(Mask)]
    mask = Mask(**{name: part for name, part in (query_side | key_side).items() if name in names})
    return jnp.where(mask.dense()[:, None, None], logits, -jnp.inf)


def _query_side(mask: Mask, alibi: Alibi | None) -> dict[str, Array]:
    """What mask and bias know of the queries, by chunk: [chunks, B or 1, T] each."""
    known = {name: getattr(mask, name) for name in ("first", "last", "q_segments", "q_prefix_segments")}
    known |= {} if alibi is None else {"q_positions": alibi.q_positions}
    return {name: _split(x, QUERY_CHUNK, axis=1) for name, x in known.items() if x is not None}


def _key_side(mask: Mask, alibi: Alibi | None) -> dict[str, Array]:
    """What mask and bias know of the keys, by chunk: [chunks, B or 1, S] each."""
    known = {"places": mask.places, "k_segments": mask.k_segments}
    known |= {} if alibi is None else {"k_positions": alibi.k_positions}
    return {name: _split(x, KEY_CHUNK, axis=1) for name, x in known.items() if x is not None}


def _split(x: Array, size: int, *, axis: int) -> Array:
    """[..., chunks * T, ...] -> [chunks, ..., T, ...]."""
    return jnp.moveaxis(x.reshape(*x.shape[:axis], -1, size, *x.shape[axis + 1 :]), axis, 0)


def _join(x: Array, *, axis: int) -> Array:
    """The inverse of `_split`."""
    x = jnp.moveaxis(x, 0, axis)
    return x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :])
