"""What logits say of target tokens, without holding all logits: the head is applied to a chunk of tokens at a time.

A head over a large vocabulary has most of the memory of a short batch's step, and all of it is made again by the backward pass
(as Liger Kernel's fused linear cross-entropy does, Hsu et al. 2024). Its gradient is written here and not left to the
transposition of a scan, which keeps a copy of the head's kernel for every chunk.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

Array = jax.Array
Scores = tuple[Array, Array]  # [..., T]: float32 negative log-likelihood of the target, and bool, whether it is the likeliest


def scores_of(logits: Array, targets: Array) -> Scores:
    """Logits [B, T, V] float32 against targets [B, T]."""
    nll = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
    return nll, jnp.argmax(logits, axis=-1) == targets


def scores_of_chunks(head: Callable[[Array], Array], hidden: Array, targets: Array, *, count: Array) -> Scores:
    """`scores_of(head(hidden[c]), targets[c])` of the first `count` chunks c; elsewhere 0 and False.

    Args:
      head: [B, T, D] -> [B, T, V] float32; what it closes over is differentiated too.
      hidden: [chunks, B, T, D]; targets: [chunks, B, T].
      count: [] int32.

    Returns:
      [chunks, B, T] each.
    """
    pure, weights = jax.closure_convert(head, hidden[0])
    return _scores(pure, count, hidden, targets, *weights)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _scores(head: Callable[..., Array], count: Array, hidden: Array, targets: Array, *weights: Array) -> Scores:
    def score(number: Array, found: Scores) -> Scores:
        of_chunk = scores_of(head(hidden[number], *weights), targets[number])
        return tuple(all_.at[number].set(one) for all_, one in zip(found, of_chunk, strict=True))

    return jax.lax.fori_loop(0, count, score, (jnp.zeros(targets.shape, jnp.float32), jnp.zeros(targets.shape, bool)))


def _forward(head: Callable[..., Array], count: Any, hidden: Any, targets: Any, *weights: Any) -> tuple[Scores, Any]:
    """Arguments come with whether they are differentiated: of a frozen head's kernel no gradient is computed."""
    values = [one.value for one in (count, hidden, targets, *weights)]
    return _scores(head, *values), (values, [one.perturbed for one in (hidden, *weights)])


def _backward(head: Callable[..., Array], kept: Any, slopes: tuple[Any, Any]) -> tuple[Any, ...]:
    (count, hidden, targets, *weights), (of_hidden, *of_weights) = kept
    slope = slopes[0]
    if isinstance(slope, jax.custom_derivatives.SymbolicZero):
        return (None,) * (3 + len(weights))
    wanted = [place for place, perturbed in enumerate(of_weights) if perturbed]

    def loss(hidden: Array, number: Array, *weights: Array) -> Array:
        return jnp.sum(scores_of(head(hidden, *weights), targets[number])[0] * slope[number])

    gradients = jax.grad(loss, argnums=(0, *(2 + place for place in wanted)))

    def add(number: Array, total: tuple[Array, list[Array]]) -> tuple[Array, list[Array]]:
        of_chunk, *more = gradients(hidden[number], number, *weights)
        return total[0].at[number].set(of_chunk), jax.tree.map(jnp.add, total[1], more)

    nothing = jnp.zeros_like(hidden), [jnp.zeros_like(weights[place]) for place in wanted]
    total, sums = jax.lax.fori_loop(0, count, add, nothing)
    found = dict(zip(wanted, sums, strict=True))
    return None, total if of_hidden else None, None, *map(found.get, range(len(weights)))


_scores.defvjp(_forward, _backward, symbolic_zeros=True)
