"""Beam search, with the constraints of transformers: every row keeps its K best hypotheses, and its K best finished answers.

A finished answer counts with the sum of its log-probabilities divided by its length to the power of the length penalty. A row
ends when no hypothesis can overtake its finished answers any more, judged by the best hypothesis at its present length; with
`early_stopping` as soon as K answers are finished. What ends in a batch is frozen, so that a row's answer does not depend on
its neighbours.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from vlm_jax.generation.decode import END_TOKEN, LIMIT, Constraints, Context, Prefilled, extend, repeat_rows
from vlm_jax.generation.sampling import penalise
from vlm_jax.models.vlm import VisionLanguageModel

Array = jax.Array
NEG_INF = -1e9  # a score that is worse than any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BeamSettings:
    """How beams are judged."""

    length_penalty: Array  # [] float32; 0: the sum alone, above 0 prefers long answers
    early_stopping: Array  # [] bool
    repetition_penalty: Array  # [B] float32, see `sampling.penalise`


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Generated:
    """The best answer of every row."""

    tokens: Array  # [B, new] int32, the end token included, padding after it
    log_probabilities: Array  # [B, new] float32, the model's own
    lengths: Array  # [B] int32
    reasons: Array  # [B] int32, END_TOKEN or LIMIT


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Hypotheses:
    """Token sequences of each row, the best first."""

    scores: Array  # [B, beams] float32
    tokens: Array  # [B, beams, new] int32
    log_probabilities: Array  # [B, beams, new] float32, the model's own
    lengths: Array  # [B, beams] int32
    ended: Array  # [B, beams] bool, by an end token
    finished: Array  # [B, beams] bool


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Beams:
    """Rows whose beams are being extended."""

    count: Array  # [] int32, new tokens of every hypothesis
    running: _Hypotheses
    done: _Hypotheses
    improvable: Array  # [B] bool, whether a hypothesis may still overtake the finished answers
    over: Array  # [B] bool
    context: Context  # of B * beams rows
    used_tokens: Array  # [B * beams, V] bool


def begin(prompt: Prefilled, search: BeamSettings, constraints: Constraints, limits: Array, *, room: int, beams: int) -> Beams:
    """The first new token of every beam. Stop sequences are not looked at.

    Args:
      limits: [B] int32, tokens a row may have, at most `room`.
      room: new tokens that there is a place for.
    """
    rows, slots = limits.shape[0], prompt.context.cache.positions.shape[1] + room
    prompt = repeat_rows(prompt, beams)
    empty = _Hypotheses(
        scores=jnp.full((rows, beams), NEG_INF),
        tokens=jnp.full((rows, beams, room), constraints.pad, jnp.int32),
        log_probabilities=jnp.zeros((rows, beams, room), jnp.float32),
        lengths=jnp.zeros((rows, beams), jnp.int32),
        ended=jnp.zeros((rows, beams), bool),
        finished=jnp.zeros((rows, beams), bool),
    )
    # All beams begin alike: only the first one's continuations count.
    running = dataclasses.replace(empty, scores=empty.scores.at[:, 0].set(0.0))
    state = Beams(
        count=jnp.zeros((), jnp.int32),
        running=running,
        done=empty,
        improvable=jnp.ones(rows, bool),
        over=limits <= 0,
        context=prompt.context.with_slots(slots),
        used_tokens=prompt.used_tokens,
    )
    return _advance(state, prompt.logits, search, constraints, limits)


def step(
    model: VisionLanguageModel, params: Any, state: Beams, search: BeamSettings, constraints: Constraints, limits: Array
) -> Beams:
    """One more token for every hypothesis."""
    last_token = jax.lax.dynamic_index_in_dim(state.running.tokens, state.count - 1, axis=2, keepdims=False).reshape(-1)
    logits, context = extend(model, params, state.context, last_token, jnp.ones(last_token.shape, bool))
    return _advance(dataclasses.replace(state, context=context), logits, search, constraints, limits)


def best(state: Beams) -> Generated:
    """The best answer of every row."""
    first = jax.tree.map(lambda x: x[:, 0], state.done)
    return Generated(first.tokens, first.log_probabilities, first.lengths, jnp.where(first.ended, END_TOKEN, LIMIT))


def _advance(state: Beams, logits: Array, search: BeamSettings, constraints: Constraints, limits: Array) -> Beams:
    """One more token for every hypothesis: [B * beams, V] logits."""
    rows, beams, _ = state.running.tokens.shape
    count, vocabulary = state.count, logits.shape[-1]
    own = jax.nn.log_softmax(logits, axis=-1)
    scores = penalise(own, state.used_tokens, jnp.repeat(search.repetition_penalty, beams))
    scores = jnp.where(constraints.allowed, scores, -jnp.inf).reshape(rows, beams, vocabulary)
    scores = (scores + state.running.scores[:, :, None]).reshape(rows, -1)
    # Enough candidates for K to go on, even if all ends of all beams are among the best.
    most = min(max(2, 1 + constraints.ends.shape[0]) * beams, beams * vocabulary)
    best, places = jax.lax.top_k(scores, most)
    beam, token = places // vocabulary, (places % vocabulary).astype(jnp.int32)
    candidates = _extended(state.running, count, beam, token, best, own.reshape(rows, -1), places, constraints, limits)

    going = best + jnp.where(candidates.finished, NEG_INF, 0.0)
    kept = jax.lax.top_k(going, beams)[1]
    running = _chosen(dataclasses.replace(candidates, scores=going), kept)
    done = _finished(state, candidates, search)
    improvable = state.improvable & _can_improve(running, done, count + 1, search)
    full = jnp.all(done.finished, axis=1) & search.early_stopping
    over = state.over | ~improvable | full | jnp.all(candidates.finished, axis=1)

    # From here on a beam is the row of the cache that its hypothesis came from.
    origin = (jnp.arange(rows)[:, None] * beams + jnp.take_along_axis(beam, kept, axis=1)).reshape(-1)
    last_token = jnp.take_along_axis(token, kept, axis=1).reshape(-1)
    cache = state.context.cache.map_rows(lambda x, axis: jnp.take(x, origin, axis=axis))
    used_tokens = state.used_tokens[origin].at[jnp.arange(rows * beams), last_token].set(True)
    return dataclasses.replace(
        state,
        count=count + 1,
        running=running,
        done=done,
        improvable=improvable,
        over=over,
        context=dataclasses.replace(state.context, cache=cache.placed()),
        used_tokens=used_tokens,
    )


def _extended(
    running: _Hypotheses,
    count: Array,
    beam: Array,
    token: Array,
    scores: Array,
    own: Array,
    places: Array,
    constraints: Constraints,
    limits: Array,
) -> _Hypotheses:
    """The candidates [B, candidates], each a hypothesis and one token."""
    base = _chosen(running, beam)
    put = lambda old, new: jax.lax.dynamic_update_index_in_dim(old, new.astype(old.dtype), count, axis=2)
    ended = jnp.isin(token, constraints.ends)
    return _Hypotheses(
        scores=scores,
        tokens=put(base.tokens, token),
        log_probabilities=put(base.log_probabilities, jnp.take_along_axis(own, places, axis=1)),
        lengths=base.lengths + 1,
        ended=ended,
        finished=ended | (count + 1 >= limits)[:, None],
    )


def _finished(state: Beams, candidates: _Hypotheses, search: BeamSettings) -> _Hypotheses:
    """The K best of the finished answers so far and of the candidates that have just finished."""
    done = state.done
    beams = done.scores.shape[1]
    scores = candidates.scores / (state.count + 1).astype(jnp.float32) ** search.length_penalty
    # The candidates behind the first K are there to go on, not to win.
    new = candidates.finished & (jnp.arange(candidates.scores.shape[1]) < beams)
    closed = state.over | ~state.improvable | (jnp.all(done.finished, axis=1) & search.early_stopping)
    scores = scores + jnp.where(new, 0.0, NEG_INF) + jnp.where(closed, NEG_INF, 0.0)[:, None]
    candidates = dataclasses.replace(candidates, scores=scores, finished=new & ~closed[:, None])
    both = jax.tree.map(lambda a, b: jnp.concatenate([a, b], axis=1), done, candidates)
    return _chosen(both, jax.lax.top_k(both.scores, beams)[1])


def _can_improve(running: _Hypotheses, done: _Hypotheses, count: Array, search: BeamSettings) -> Array:
    """[B] bool: the best hypothesis, judged as if it ended now, against the worst finished answer."""
    best = running.scores[:, 0] / count.astype(jnp.float32) ** search.length_penalty
    worst = jnp.where(done.finished, jnp.min(done.scores, axis=1, keepdims=True), NEG_INF)
    return jnp.any(best[:, None] > worst, axis=1)


def _chosen(answers: _Hypotheses, places: Array) -> _Hypotheses:
    """The answers [B, ...] at `places` [B, candidates]."""
    pick = lambda x: jnp.take_along_axis(x, places if x.ndim == 2 else places[..., None], axis=1)
    return jax.tree.map(pick, answers)
