"""The next token: cross-entropy of what a batch says is to be learned."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from vlm_jax.batch import Batch
from vlm_jax.config import NextTokenConfig
from vlm_jax.ops.experts import load_balance
from vlm_jax.ops.token_scores import Scores, scores_of, scores_of_chunks
from vlm_jax.sharding import shards
from vlm_jax.training.objective import OBJECTIVES, Objective, Sums

Array = jax.Array


@OBJECTIVES.add(NextTokenConfig)
class NextToken(Objective):
    """`loss` and `token_accuracy` a token, `accuracy` a sequence: whether greedy decoding gives exactly its learned tokens."""

    checkpoint_metric, examples_metric = "accuracy", "sequences"

    def __init__(self, config: NextTokenConfig) -> None:
        self.config = config

    def weight(self, batch: Batch) -> Array:
        return jnp.maximum(jnp.sum(batch.weights), 1.0)

    def sums(self, model: nn.Module, params: Any, batch: Batch, *, recompute: bool = True) -> Sums:
        *scores, layers = learned_scores(model, params, batch, logits_mib=self.config.logits_mib if recompute else None)
        sums = sums_of(*scores, batch)
        if self.config.router_loss:
            balance = load_balance(layers["router_logits"], batch.segments > 0, model.config.language.block.experts.chosen)
            sums["router_loss"] = balance * sums["weight"]
            sums["loss"] = sums["loss"] + self.config.router_loss * sums["router_loss"]
        return sums

    def means(self, sums: dict[str, Any]) -> dict[str, Any]:
        weight, sequences = (jnp.maximum(sums[name], 1.0) for name in ("weight", "sequences"))
        router = {"router_loss": sums["router_loss"] / weight} if "router_loss" in sums else {}
        return {
            "loss": sums["loss"] / weight,
            "token_accuracy": sums["tokens_right"] / weight,
            "accuracy": sums["right"] / sequences,
            "sequences": sums["sequences"],
        } | router

    def training_line(self, metrics: dict[str, float]) -> str:
        return f"loss {metrics['loss']:.4f}  accuracy {metrics['accuracy']:.1%}"

    def evaluation_line(self, metrics: dict[str, float]) -> str:
        return f"accuracy {metrics['accuracy']:.2%} on {metrics['sequences']:,.0f} held-out answers, loss {metrics['loss']:.4f}"


def learned_scores(
    model: nn.Module, params: Any, batch: Batch, *, logits_mib: int | None
) -> tuple[Array, Array, dict[str, Array]]:
    """`Scores` of what a batch says is to be learned, and what the layers give beside the hidden states.

    Args:
      logits_mib: MiB of float32 logits that a device may hold at once; None: all.
    """
    hidden, layers = _hidden(model, params, batch)
    head = lambda hidden: model.apply({"params": params}, hidden, method="logits")
    vocabulary = jax.eval_shape(head, hidden).shape[-1]
    most = None if logits_mib is None else logits_mib * 2**20
    of = dict(learned=batch.weights > 0, vocabulary=vocabulary, most=most)
    return *chunked_scores(head, hidden, batch.targets, **of), layers


@functools.partial(jax.jit, static_argnums=0)
def _hidden(model: nn.Module, params: Any, batch: Batch) -> tuple[Array, dict[str, Array]]:
    """A function of its own, so that it is traced once for the step, its evaluation and its FLOPs."""
    return model.apply({"params": params}, batch, method="hidden")


CHUNKS = 8  # at least: what no row learns is left out by whole chunks


def chunked_scores(
    head: Callable[[Array], Array], hidden: Array, targets: Array, *, learned: Array, vocabulary: int, most: int | None
) -> Scores:
    """`scores_of(head(hidden), targets)` where `learned`, elsewhere 0 and False: the head is applied to nothing else.

    The learned tokens of each row come first, and are scored a chunk at a time until no row has any. A chunk's logits take at
    most `most` bytes of a device and are computed again in the backward pass, so that no array [B, T, V] is ever made.

    Args:
      head: [B, chunk, D] -> [B, chunk, V] float32.
      hidden: [B, T, D]; targets: [B, T]; learned: [B, T] bool.
      most: None: all at once, as mathematics.
    """
    if most is None:
        nll, hit = scores_of(head(hidden), targets)
        return jnp.where(learned, nll, 0.0), hit & learned
    rows, tokens = targets.shape
    of_token = 4 * (-(-rows // shards("batch", rows))) * (-(-vocabulary // shards("vocab", vocabulary)))
    chunks = max(-(-tokens // max(1, most // of_token)), min(CHUNKS, tokens))
    size = -(-tokens // chunks)
    order = jnp.argsort(~learned, axis=1, stable=True)
    used = jnp.max(jnp.sum(learned, axis=1))

    def split(x: Array) -> Array:
        x = jnp.take_along_axis(x, order.reshape(*order.shape, *(1,) * (x.ndim - 2)), axis=1)
        padded = jnp.pad(x, ((0, 0), (0, chunks * size - tokens), *((0, 0),) * (x.ndim - 2)))
        return jnp.moveaxis(padded.reshape(rows, chunks, size, *x.shape[2:]), 1, 0)

    nll, hit = scores_of_chunks(head, split(hidden), split(targets), count=-(-used // size))
    place = jnp.argsort(order, axis=1)
    join = lambda x: jnp.take_along_axis(jnp.moveaxis(x, 0, 1).reshape(rows, -1)[:, :tokens], place, axis=1)
    return jnp.where(learned, join(nll), 0.0), join(hit) & learned


def sums_of(nll: Array, hit: Array, batch: Batch) -> Sums:
    """Sums over a batch.

    Returns:
      Scalars: `loss` and `weight` (sums over tokens), `tokens_right`, `sequences` (segments with something to predict) and
      `right` (those of them whose every learned token is the most likely one: greedy decoding gives exactly this answer,
      since it makes the same choices as long as they are right).
    """
    learned = batch.weights > 0
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
