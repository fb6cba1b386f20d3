"""The loss and the counts of a batch, as sums: dividing by the summed weights is left to who knows the whole batch.

Axis letters: B rows, T tokens, V vocabulary.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax

from vlm_jax.data.batch import Batch

Array = jax.Array
Sums = dict[str, Array]


def next_token_sums(logits: Array, batch: Batch) -> Sums:
    """Cross-entropy and right answers of a batch.

    Args:
      logits: [B, T, V] float32.

    Returns:
      Scalars: `loss` and `weight` (sums over tokens), `tokens_right`, `sequences` (segments with something to predict) and
      `right` (those of them whose every learned token is the most likely one: greedy decoding gives exactly this answer,
      since it makes the same choices as long as they are right).
    """
    nll = optax.softmax_cross_entropy_with_integer_labels(logits, batch.targets)
    learned = batch.weights > 0
    hit = jnp.argmax(logits, axis=-1) == batch.targets
    most = batch.tokens.shape[1] + 1
    count = jax.vmap(lambda x, segments: jax.ops.segment_sum(x.astype(jnp.int32), segments, most))
    asked = count(learned, batch.segments) > 0
    missed = count(learned & ~hit, batch.segments) > 0
    return {
        "loss": jnp.sum(nll * batch.weights),
        "weight": jnp.sum(batch.weights),
        "tokens_right": jnp.sum(jnp.where(hit, batch.weights, 0.0)),
        "sequences": jnp.sum(asked, dtype=jnp.float32),
        "right": jnp.sum(asked & ~missed, dtype=jnp.float32),
    }


def means(sums: Sums) -> Sums:
    """What is reported: `loss` and `token_accuracy` a token, `accuracy` a sequence. Nothing to learn from gives 0."""
    weight, sequences = (jnp.maximum(sums[name], 1.0) for name in ("weight", "sequences"))
    return {
        "loss": sums["loss"] / weight,
        "token_accuracy": sums["tokens_right"] / weight,
        "accuracy": sums["right"] / sequences,
        "sequences": sums["sequences"],
    }
