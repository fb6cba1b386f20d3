"""Which experts a token goes to, and the feed-forward of every token through its own: none is dropped."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

Array = jax.Array


def route(logits: Array, chosen: int) -> tuple[Array, Array]:
    """The `chosen` best experts of each token (Shazeer et al. 2017; softmax over all of them first, as Mixtral).

    Args:
      logits: [..., E].

    Returns:
      [..., chosen] float32 weights that add up to 1, and [..., chosen] int32 numbers of experts.
    """
    top, numbers = jax.lax.top_k(jax.nn.softmax(logits.astype(jnp.float32), axis=-1), chosen)
    return top / jnp.sum(top, axis=-1, keepdims=True), numbers


def mixture(
    x: Array,
    weights: Array,
    numbers: Array,
    gate: Array | None,
    up: Array,
    down: Array,
    activation: Callable[[Array], Array],
) -> Array:
    """The weighted sum of each token's experts: down(act(gate x) * up x), without a gate down(act(up x)).

    Tokens are sorted by expert, so that each expert is one matrix product over the rows that are its own.

    Args:
      x: [tokens, D].
      weights, numbers: [tokens, chosen], of `route`.
      gate, up: [E, D, F].
      down: [E, F, D].

    Returns:
      [tokens, D].
    """
    each = numbers.shape[1]
    flat = numbers.reshape(-1)
    order = jnp.argsort(flat)
    sizes = jnp.bincount(flat, length=up.shape[0])
    rows = x[order // each]
    hidden = jax.lax.ragged_dot(rows, up, sizes)
    hidden = activation(hidden) if gate is None else activation(jax.lax.ragged_dot(rows, gate, sizes)) * hidden
    y = jax.lax.ragged_dot(hidden, down, sizes)
    # Sorted back, a token's results lie together: a sum, where scattered additions have no order on a GPU.
    y = y[jnp.argsort(order)].reshape(*numbers.shape, -1)
    return jnp.einsum("...ED,...E->...D", y, weights.astype(y.dtype))


def load_balance(logits: Array, counted: Array, chosen: int) -> Array:
    """[] float32, least when all experts get as many tokens (Fedus et al. 2021, equation 4, in transformers' form).

    Args:
      logits: [L, B, T, E], what the routers of all layers say.
      counted: [B, T] bool, the tokens that count.
      chosen: experts of a token.
    """
    probabilities = jax.nn.softmax(logits.astype(jnp.float32), axis=-1)
    _, numbers = jax.lax.top_k(probabilities, chosen)
    taken = jnp.sum(jax.nn.one_hot(numbers, logits.shape[-1]), axis=-2)
    count = jnp.maximum(logits.shape[0] * jnp.sum(counted), 1)
    share = lambda x: jnp.einsum("LBTE,BT->E", x, counted.astype(jnp.float32)) / count
    return logits.shape[-1] * jnp.sum(share(taken) * share(probabilities))
