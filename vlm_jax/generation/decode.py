"""Generation as pure functions of a state that has everything row by row: `prefill`, `begin`, `step`, `insert`.

A batch of questions, a stream and a server are three callers of them: the first runs `steps` until all rows are done, the
second one step after the other, the third puts a new question where a row has become free.

The prompts are a `Batch` without targets, one conversation a row, padding behind it; a row that is only padding has segments 0
and a limit of 0. Without pictures in any row `images` is None. Shapes come in buckets (`buckets.py`), and everything else is an
array: a second request of similar size compiles nothing.

Axis letters: B rows, T prompt tokens, N new tokens, S cache slots, V vocabulary, E end tokens, X stop sequences of W tokens.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from vlm_jax.batch import Batch
from vlm_jax.generation.sampling import Sampling, penalise, sample
from vlm_jax.layers.decoder import Cache
from vlm_jax.models.vlm import VisionLanguageModel
from vlm_jax.sharding import constrain

Array = jax.Array

RUNNING, END_TOKEN, STOP_SEQUENCE, LIMIT = range(4)
ANY, NEVER = -1, -2  # in `Wishes.stops`

_state = lambda cls: jax.tree_util.register_dataclass(dataclasses.dataclass(frozen=True, kw_only=True)(cls))


@_state
class Rules:
    """What may be generated at all, and what ends every answer."""

    allowed: Array  # [V] bool
    ends: Array  # [E] int32
    pad: Array  # [] int32, what stands for the tokens of rows that are done


@_state
class Wishes:
    """What each row asks for."""

    sampling: Sampling
    limits: Array  # [B] int32, tokens a row may have
    stops: Array  # [B, X, W] int32, any of these ends the row; aligned right, `ANY` in front, `NEVER` for an unused one


@_state
class Context:
    """What the model keeps of each row's tokens and media."""

    cache: Cache
    memory: Any  # of the media, see `VisionLanguageModel.memory`
    media_first: Array  # [B] int32, the image slots that new tokens see: those of the prompt's last token
    media_last: Array  # [B] int32

    def with_slots(self, slots: int) -> Context:
        """With room for so many tokens."""
        return dataclasses.replace(self, cache=self.cache.with_slots(slots))


@_state
class Prefilled:
    """Prompts that the model has read."""

    logits: Array  # [B, V] float32, of the first new token
    context: Context
    seen: Array  # [B, V] bool, the prompt's tokens


@_state
class State:
    """Rows that are being answered."""

    context: Context  # of all tokens but the newest
    newest: Array  # [B] int32
    count: Array  # [B] int32, new tokens so far
    tail: Array  # [B, W] int32, the newest W tokens
    seen: Array  # [B, V] bool, the tokens so far, the prompt's among them
    reasons: Array  # [B] int32, why the row ended: END_TOKEN, STOP_SEQUENCE or LIMIT; RUNNING: it goes on
    wishes: Wishes


@_state
class Picked:
    """The next tokens of all rows."""

    tokens: Array  # [B] or [B, N] int32, the end token included, padding after it
    log_probabilities: Array  # likewise, float32; the model's own, before temperature and restrictions; 0 after the end


def prefill(model: VisionLanguageModel, params: Any, prompts: Batch) -> Prefilled:
    """Reads the media and the prompts."""
    apply = lambda method, *args, **named: model.apply({"params": params}, *args, **named, method=method)
    visual = apply("visual_tokens", prompts)
    memory = apply("memory", visual)
    out = apply("read", prompts, visual=visual, memory=memory, keep=True)
    last = jnp.maximum(out.cache.used - 1, 0)[:, None]
    logits = apply("logits", jnp.take_along_axis(out.hidden, last[..., None], axis=1))[:, 0]
    rows, vocabulary = logits.shape
    # Padding is written behind the vocabulary, where it is dropped.
    written = jnp.where(prompts.segments > 0, prompts.tokens, vocabulary)
    of_last = lambda field: jnp.take_along_axis(field, last, axis=1)[:, 0]
    return Prefilled(
        logits=logits,
        context=Context(
            cache=out.cache.placed(),
            memory=memory,
            media_first=of_last(prompts.media_first),
            media_last=of_last(prompts.media_last),
        ),
        seen=jnp.zeros((rows, vocabulary), bool).at[jnp.arange(rows)[:, None], written].set(True, mode="drop"),
    )


def begin(prompt: Prefilled, wishes: Wishes, rules: Rules, *, slots: int) -> tuple[State, Picked]:
    """The state with the first new token of every row.

    Args:
      slots: S, room for the prompt and all new tokens.
    """
    rows, width = wishes.limits.shape[0], wishes.stops.shape[-1]
    state = State(
        context=prompt.context.with_slots(slots),
        newest=jnp.full(rows, NEVER, jnp.int32),
        count=jnp.zeros(rows, jnp.int32),
        tail=jnp.full((rows, width), NEVER, jnp.int32),
        seen=prompt.seen,
        reasons=jnp.where(wishes.limits > 0, RUNNING, LIMIT).astype(jnp.int32),
        wishes=wishes,
    )
    return pick(state, prompt.logits, rules)


def insert(state: State, rows: Array, others: State) -> State:
    """`others` [R rows] in the place of `rows` [R] int32 of the state, whose slots and media have the same room."""

    def put(old: Array, new: Array) -> Array:
        return old.at[:, rows].set(new) if rows_axis(old) else old.at[rows].set(new)

    return _placed(jax.tree.map(put, state, others))


def extend(model: VisionLanguageModel, params: Any, context: Context, tokens: Array, runs: Array) -> tuple[Array, Context]:
    """Reads one more token of each row: its logits [B, V], and the context with it.

    Args:
      tokens: [B] int32.
      runs: [B] bool; of a row that does not, nothing is kept.
    """
    apply = lambda *args, method, **named: model.apply({"params": params}, *args, **named, method=method)
    column = lambda x: x[:, None]
    positions = column(context.cache.used)
    batch = Batch(
        tokens=column(tokens),
        positions=positions,
        segments=column(runs.astype(jnp.int32)),
        media_first=column(context.media_first),
        media_last=column(context.media_last),
        prefix_end=positions,
    )
    out = apply(batch, memory=context.memory, cache=context.cache, method="read")
    return apply(out.hidden, method="logits")[:, 0], dataclasses.replace(context, cache=out.cache.placed())


def step(model: VisionLanguageModel, params: Any, state: State, rules: Rules) -> tuple[State, Picked]:
    """One more token for every row that runs."""
    logits, context = extend(model, params, state.context, state.newest, state.reasons == RUNNING)
    return pick(dataclasses.replace(state, context=context), logits, rules)


def steps(
    model: VisionLanguageModel, params: Any, state: State, rules: Rules, most: Array, *, room: int
) -> tuple[State, Picked, Array]:
    """Up to `most` steps, fewer where all rows are done before.

    Args:
      most: [] int32, at most `room`.
      room: N.

    Returns:
      the state, the tokens [B, N], and how many of their columns were filled.
    """
    rows = state.newest.shape[0]
    blank = Picked(tokens=jnp.full((rows, room), rules.pad, jnp.int32), log_probabilities=jnp.zeros((rows, room)))

    def goes_on(carry: tuple[State, Picked, Array]) -> Array:
        state, _, done = carry
        return (done < most) & jnp.any(state.reasons == RUNNING)

    def one(carry: tuple[State, Picked, Array]) -> tuple[State, Picked, Array]:
        state, out, done = carry
        state, picked = step(model, params, state, rules)
        put = lambda old, new: jax.lax.dynamic_update_slice(old, new[:, None], (0, done))
        return state, jax.tree.map(put, out, picked), done + 1

    return jax.lax.while_loop(goes_on, one, (state, blank, jnp.zeros((), jnp.int32)))


def pick(state: State, logits: Array, rules: Rules) -> tuple[State, Picked]:
    """The next token of every row that runs, from its logits [B, V]."""
    runs, wishes = state.reasons == RUNNING, state.wishes
    penalised = penalise(logits, state.seen, wishes.sampling.repetition_penalty)
    token = sample(jnp.where(rules.allowed, penalised, -jnp.inf), wishes.sampling, state.count)
    token = jnp.where(runs, token, rules.pad)
    chosen = jnp.take_along_axis(logits, token[:, None], axis=-1)[:, 0]
    log_probability = jnp.where(runs, chosen - jax.nn.logsumexp(logits, axis=-1), 0.0)
    tail = jnp.concatenate([state.tail[:, 1:], token[:, None]], axis=1)

    stopped = jnp.any(jnp.all((wishes.stops == ANY) | (wishes.stops == tail[:, None]), axis=-1), axis=-1)
    reason = jnp.where(state.count + 1 >= wishes.limits, LIMIT, RUNNING)
    reason = jnp.where(stopped, STOP_SEQUENCE, reason)
    reason = jnp.where(jnp.isin(token, rules.ends), END_TOKEN, reason)
    new = dataclasses.replace(
        state,
        newest=token,
        count=state.count + runs,
        tail=tail,
        seen=state.seen.at[jnp.arange(token.shape[0]), token].set(True),
        reasons=jnp.where(runs, reason, state.reasons).astype(jnp.int32),
    )
    return _placed(new), Picked(tokens=token, log_probabilities=log_probability)


def repeated(prompt: Prefilled, times: int) -> Prefilled:
    """Every row so many times, one after the other."""
    return jax.tree.map(lambda x: jnp.repeat(x, times, axis=rows_axis(x)), prompt)


def rows_axis(x: Array) -> int:
    """Keys and values of stacked layers have the layers in front, everything else the rows."""
    return int(x.ndim == 5)


def _placed(state: State) -> State:
    """Rows keep their place on the mesh from step to step, so that the next call finds the program compiled."""
    lay = lambda x: x if x.ndim > 3 else constrain(x, "batch", *(None,) * (x.ndim - 1))
    laid = jax.tree.map(lay, state)
    context = dataclasses.replace(laid.context, cache=state.context.cache.placed())
    return dataclasses.replace(laid, context=context, seen=constrain(state.seen, "batch", "vocab"))
