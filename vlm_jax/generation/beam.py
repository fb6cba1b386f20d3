"""Beam search, with the rules of transformers: every row keeps its K best beginnings, and its K best finished answers.

A finished answer counts with the sum of its log-probabilities divided by its length to the power of the length penalty. A row
ends when no beginning can overtake its finished answers any more, judged by the best beginning at its present length; with
`early_stopping` as soon as K answers are finished. What ends in a batch is frozen, so that a row's answer does not depend on
its neighbours.

Axis letters: B rows, K beams, C candidates of a step, N new tokens, V vocabulary, E end tokens.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from vlm_jax.generation.decode import END_TOKEN, LIMIT, Prompt, Rules, advance, repeated, rows_axis
from vlm_jax.generation.sampling import penalise
from vlm_jax.layers.decoder import Cache
from vlm_jax.models.vlm import VisionLanguageModel

Array = jax.Array
NEVER = -1e9  # a score that is worse than any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Search:
    """How beams are judged."""

    length_penalty: Array  # [] float32; 0: the sum alone, above 0 prefers long answers
    early_stopping: Array  # [] bool
    repetition_penalty: Array  # [B] float32, see `sampling.penalise`


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Found:
    """The best answer of every row."""

    tokens: Array  # [B, N] int32, the end token included, padding after it
    log_probabilities: Array  # [B, N] float32, the model's own
    lengths: Array  # [B] int32
    reasons: Array  # [B] int32, END_TOKEN or LIMIT


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Answers:
    """Token sequences of each row, the best first."""

    scores: Array  # [B, K] float32
    tokens: Array  # [B, K, N] int32
    log_probabilities: Array  # [B, K, N] float32, the model's own
    lengths: Array  # [B, K] int32
    ended: Array  # [B, K] bool, by an end token
    finished: Array  # [B, K] bool


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Progress:
    count: Array  # [] int32, new tokens of every beginning
    running: _Answers
    done: _Answers
    improvable: Array  # [B] bool, whether a beginning may still overtake the finished answers
    over: Array  # [B] bool
    cache: Cache
    seen: Array  # [B * K, V] bool


def generate(
    model: VisionLanguageModel,
    params: Any,
    prompt: Prompt,
    search: Search,
    rules: Rules,
    limits: Array,
    *,
    new: int,
    beams: int,
) -> Found:
    """The best answer of up to `new` tokens for every prompt. Stop sequences are not looked at.

    Args:
      limits: [B] int32, tokens a row may have, at most N.
      new: N; beams: K.
    """
    rows, slots = limits.shape[0], prompt.cache.positions.shape[1] + new
    prompt = repeated(prompt, beams)
    prompt = dataclasses.replace(prompt, cache=prompt.cache.with_slots(slots))
    empty = _Answers(
        scores=jnp.full((rows, beams), NEVER),
        tokens=jnp.full((rows, beams, new), rules.pad, jnp.int32),
        log_probabilities=jnp.zeros((rows, beams, new), jnp.float32),
        lengths=jnp.zeros((rows, beams), jnp.int32),
        ended=jnp.zeros((rows, beams), bool),
        finished=jnp.zeros((rows, beams), bool),
    )
    # All beams begin alike: only the first one's continuations count.
    running = dataclasses.replace(empty, scores=empty.scores.at[:, 0].set(0.0))
    progress = _Progress(
        count=jnp.zeros((), jnp.int32),
        running=running,
        done=empty,
        improvable=jnp.ones(rows, bool),
        over=limits <= 0,
        cache=prompt.cache.placed(),
        seen=prompt.seen,
    )
    everywhere = jnp.ones(rows * beams, bool)

    def step(progress: _Progress) -> _Progress:
        newest = jax.lax.dynamic_index_in_dim(progress.running.tokens, progress.count - 1, axis=2, keepdims=False)
        here = dataclasses.replace(prompt, cache=progress.cache)
        logits, cache = advance(model, params, here, newest.reshape(-1), everywhere)
        return _advance(dataclasses.replace(progress, cache=cache.placed()), logits, search, rules, limits)

    progress = _advance(progress, prompt.logits, search, rules, limits)
    done = jax.lax.while_loop(lambda p: ~jnp.all(p.over), step, progress).done
    best = jax.tree.map(lambda x: x[:, 0], done)
    return Found(best.tokens, best.log_probabilities, best.lengths, jnp.where(best.ended, END_TOKEN, LIMIT))


def _advance(progress: _Progress, logits: Array, search: Search, rules: Rules, limits: Array) -> _Progress:
    """One more token for every beginning: [B * K, V] logits."""
    rows, beams, _ = progress.running.tokens.shape
    count, vocabulary = progress.count, logits.shape[-1]
    own = jax.nn.log_softmax(logits, axis=-1)
    scores = penalise(own, progress.seen, jnp.repeat(search.repetition_penalty, beams))
    scores = jnp.where(rules.allowed, scores, -jnp.inf).reshape(rows, beams, vocabulary)
    scores = (scores + progress.running.scores[:, :, None]).reshape(rows, -1)
    # Enough candidates for K to go on, even if all ends of all beams are among the best.
    most = min(max(2, 1 + rules.ends.shape[0]) * beams, beams * vocabulary)
    best, places = jax.lax.top_k(scores, most)
    beam, token = places // vocabulary, (places % vocabulary).astype(jnp.int32)
    candidates = _extended(progress.running, count, beam, token, best, own.reshape(rows, -1), places, rules, limits)

    going = best + jnp.where(candidates.finished, NEVER, 0.0)
    kept = jax.lax.top_k(going, beams)[1]
    running = _chosen(dataclasses.replace(candidates, scores=going), kept)
    done = _finished(progress, candidates, search)
    improvable = progress.improvable & _can_improve(running, done, count + 1, search)
    full = jnp.all(done.finished, axis=1) & search.early_stopping
    over = progress.over | ~improvable | full | jnp.all(candidates.finished, axis=1)

    # From here on a beam is the row of the cache that its beginning came from.
    origin = (jnp.arange(rows)[:, None] * beams + jnp.take_along_axis(beam, kept, axis=1)).reshape(-1)
    newest = jnp.take_along_axis(token, kept, axis=1).reshape(-1)
    cache = progress.cache
    of_origin = lambda part: jax.tree.map(lambda x: jnp.take(x, origin, axis=rows_axis(x)), part)
    cache = dataclasses.replace(cache, keys=of_origin(cache.keys), values=of_origin(cache.values))
    seen = progress.seen[origin].at[jnp.arange(rows * beams), newest].set(True)
    return _Progress(count + 1, running, done, improvable, over, cache, seen)


def _extended(
    running: _Answers,
    count: Array,
    beam: Array,
    token: Array,
    scores: Array,
    own: Array,
    places: Array,
    rules: Rules,
    limits: Array,
) -> _Answers:
    """The candidates [B, C], each a beginning and one token."""
    base = _chosen(running, beam)
    put = lambda old, new: jax.lax.dynamic_update_index_in_dim(old, new.astype(old.dtype), count, axis=2)
    ended = jnp.isin(token, rules.ends)
    return _Answers(
        scores=scores,
        tokens=put(base.tokens, token),
        log_probabilities=put(base.log_probabilities, jnp.take_along_axis(own, places, axis=1)),
        lengths=base.lengths + 1,
        ended=ended,
        finished=ended | (count + 1 >= limits)[:, None],
    )


def _finished(progress: _Progress, candidates: _Answers, search: Search) -> _Answers:
    """The K best of the finished answers so far and of the candidates that have just finished."""
    done = progress.done
    beams = done.scores.shape[1]
    scores = candidates.scores / (progress.count + 1).astype(jnp.float32) ** search.length_penalty
    # The candidates behind the first K are there to go on, not to win.
    new = candidates.finished & (jnp.arange(candidates.scores.shape[1]) < beams)
    closed = progress.over | ~progress.improvable | (jnp.all(done.finished, axis=1) & search.early_stopping)
    scores = scores + jnp.where(new, 0.0, NEVER) + jnp.where(closed, NEVER, 0.0)[:, None]
    candidates = dataclasses.replace(candidates, scores=scores, finished=new & ~closed[:, None])
    both = jax.tree.map(lambda a, b: jnp.concatenate([a, b], axis=1), done, candidates)
    return _chosen(both, jax.lax.top_k(both.scores, beams)[1])


def _can_improve(running: _Answers, done: _Answers, count: Array, search: Search) -> Array:
    """[B] bool: the best beginning, judged as if it ended now, against the worst finished answer."""
    best = running.scores[:, 0] / count.astype(jnp.float32) ** search.length_penalty
    worst = jnp.where(done.finished, jnp.min(done.scores, axis=1, keepdims=True), NEVER)
    return jnp.any(best[:, None] > worst, axis=1)


def _chosen(answers: _Answers, places: Array) -> _Answers:
    """The answers [B, ...] at `places` [B, C]."""
    pick = lambda x: jnp.take_along_axis(x, places if x.ndim == 2 else places[..., None], axis=1)
    return jax.tree.map(pick, answers)
