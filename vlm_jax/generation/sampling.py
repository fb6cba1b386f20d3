"""From logits to the next token: greedy, temperature, top-k and top-p (nucleus, Holtzman et al. 2020).

Every setting is an array with an entry a row, so that changing it compiles nothing, and every row has a seed of its own, so
that what it samples does not depend on its neighbours or on the batch it is in.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

Array = jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sampling:
    """How each row picks its tokens."""

    temperature: Array  # [B] float32, 0: greedy
    top_k: Array  # [B] int32, only the k likeliest; 0: all
    top_p: Array  # [B] float32, only the likeliest that together reach p; 1: all
    repetition_penalty: Array  # [B] float32, above 1 for fewer repetitions; 1: none
    seeds: Array  # [B] uint32


def penalise(scores: Array, used_tokens: Array, penalty: Array) -> Array:
    """Makes the tokens that were there already less likely (Keskar et al. 2019, CTRL): [B, V] logits or log-probabilities.

    Args:
      used_tokens: [B, V] bool, the tokens of the prompt and of the answer so far.
      penalty: [B] float32.
    """

    def apply(scores: Array, used_tokens: Array, penalty: Array) -> Array:
        factor = penalty[:, None]
        return jnp.where(used_tokens, jnp.where(scores < 0, scores * factor, scores / factor), scores)

    return jax.lax.cond(jnp.any(penalty != 1), apply, lambda scores, *_: scores, scores, used_tokens, penalty)


def sample(logits: Array, sampling: Sampling, step: Array) -> Array:
    """The next token of each row: [B, V] float32 -> [B] int32.

    Temperature comes first, then top-k, then top-p of what is left. A logit of -inf is never next_tokens.

    Args:
      step: [B] int32, or [] for all rows, the number of the token; the same seed and step give the same draw.
    """
    greedy = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    # `cond`, for the noise and the sort are most of the work, and greedy decoding needs neither.
    return jax.lax.cond(jnp.any(sampling.temperature > 0), _draw, lambda *_: greedy, logits, greedy, sampling, step)


def _draw(logits: Array, greedy: Array, sampling: Sampling, step: Array) -> Array:
    warm = sampling.temperature > 0
    logits = logits / jnp.where(warm, sampling.temperature, 1.0)[:, None]
    cut = jnp.any((sampling.top_k > 0) | (sampling.top_p < 1))
    logits = jax.lax.cond(cut, keep_likeliest, lambda x, *_: x, logits, sampling.top_k, sampling.top_p)
    noise = lambda seed, step: jax.random.gumbel(jax.random.fold_in(jax.random.key(seed), step), logits.shape[-1:])
    steps = jnp.broadcast_to(step, sampling.seeds.shape)
    drawn = jnp.argmax(logits + jax.vmap(noise)(sampling.seeds, steps), axis=-1).astype(jnp.int32)
    return jnp.where(warm, drawn, greedy)


def keep_likeliest(logits: Array, top_k: Array, top_p: Array) -> Array:
    """[B, V] with -inf for what top-k and top-p leave out; tokens that tie with the last one kept are kept.

    With probabilities .5 .3 .1 .1 and top_p .6 the first two are kept: the smallest set that reaches .6.
    """
    ordered = -jnp.sort(-logits, axis=-1)
    vocabulary = logits.shape[-1]
    k = jnp.where(top_k > 0, jnp.minimum(top_k, vocabulary), vocabulary)[:, None]
    kept = jnp.where(jnp.arange(vocabulary) < k, ordered, -jnp.inf)
    probabilities = jax.nn.softmax(kept, axis=-1)
    before = jnp.cumsum(probabilities, axis=-1) - probabilities
    # Rounding can bring the sum to 1 before the end: top_p 1 must keep everything.
    inside = (before < top_p[:, None]) | (top_p[:, None] >= 1)
    inside = inside.at[:, 0].set(True) & (kept > -jnp.inf)
    least = jnp.min(jnp.where(inside, kept, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(logits >= least, logits, -jnp.inf)
