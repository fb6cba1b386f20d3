"""Generation as pure functions of a state that has everything row by row: `prefill`, `begin`, `step`, `insert`.

A batch of questions, a stream and a server are three callers of them: the first runs `steps` until all rows are done, the
second one step after the other, the third puts a new question where a row has become free.

The prompts are a `Batch` without targets, one conversation a row, padding behind it; a row that is only padding has segments 0
and a limit of 0. Without pictures in any row `images` is None. Shapes come in buckets (`buckets.py`), and everything else is an
array: a second request of similar size compiles nothing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
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
STOP_WILDCARD, STOP_UNUSED = -1, -2  # in `RowSettings.stops`

_state = lambda cls: jax.tree_util.register_dataclass(dataclasses.dataclass(frozen=True, kw_only=True)(cls))


@_state
class Constraints:
    """What may be generated at all, and what ends every answer."""

    allowed: Array  # [V] bool
    ends: Array  # [ends] int32
    pad: Array  # [] int32, what stands for the tokens of rows that are done


@_state
class RowSettings:
    """What each row asks for."""

    sampling: Sampling
    limits: Array  # [B] int32, tokens a row may have
    stops: Array  # [B, sequences, width] int32, what ends the row, aligned right; `STOP_WILDCARD` in front, or `STOP_UNUSED`


@_state
class Context:
    """What the model keeps of each row's tokens and media."""

    cache: Cache
    media_cache: Any  # of the media, see `VisionLanguageModel.media_cache`
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
    used_tokens: Array  # [B, V] bool, the prompt's tokens


@_state
class State:
    """Rows that are being answered."""

    context: Context  # of all tokens but the newest
    last_token: Array  # [B] int32
    count: Array  # [B] int32, new tokens so far
    recent_tokens: Array  # [B, width] int32, the newest tokens
    used_tokens: Array  # [B, V] bool, the tokens so far, the prompt's among them
    reasons: Array  # [B] int32, why the row ended: END_TOKEN, STOP_SEQUENCE or LIMIT; RUNNING: it goes on
    row_settings: RowSettings


@_state
class NextTokens:
    """The next tokens of all rows."""

    tokens: Array  # [B] or [B, new] int32, the end token included, padding after it
    log_probabilities: Array  # likewise, float32; the model's own, before temperature and restrictions; 0 after the end


def prefill(model: VisionLanguageModel, params: Any, prompts: Batch) -> Prefilled:
    """Reads the media and the prompts."""
    apply = lambda method, *args, **named: model.apply({"params": params}, *args, **named, method=method)
    visual = apply("visual_tokens", prompts)
    media_cache = apply("media_cache", visual)
    out = apply("forward", prompts, visual=visual, media_cache=media_cache, return_cache=True)
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
            media_cache=media_cache,
            media_first=of_last(prompts.media_first),
            media_last=of_last(prompts.media_last),
        ),
        used_tokens=jnp.zeros((rows, vocabulary), bool).at[jnp.arange(rows)[:, None], written].set(True, mode="drop"),
    )


def begin(prompt: Prefilled, row_settings: RowSettings, constraints: Constraints, *, slots: int) -> tuple[State, NextTokens]:
    """The state with the first new token of every row.

    Args:
      slots: S, room for the prompt and all new tokens.
    """
    rows, width = row_settings.limits.shape[0], row_settings.stops.shape[-1]
    state = State(
        context=prompt.context.with_slots(slots),
        last_token=jnp.full(rows, STOP_UNUSED, jnp.int32),
        count=jnp.zeros(rows, jnp.int32),
        recent_tokens=jnp.full((rows, width), STOP_UNUSED, jnp.int32),
        used_tokens=prompt.used_tokens,
        reasons=jnp.where(row_settings.limits > 0, RUNNING, LIMIT).astype(jnp.int32),
        row_settings=row_settings,
    )
    return sample_next(state, prompt.logits, constraints)


def insert(state: State, rows: Array, others: State) -> State:
    """`others` [rows] in the place of `rows` [rows] int32 of the state, whose slots and media have the same room."""
    return _placed(map_rows(lambda old, new, axis: old.at[(slice(None),) * axis + (rows,)].set(new), state, others))


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
    out = apply(batch, media_cache=context.media_cache, cache=context.cache, method="forward")
    return apply(out.hidden, method="logits")[:, 0], dataclasses.replace(context, cache=out.cache.placed())


def step(model: VisionLanguageModel, params: Any, state: State, constraints: Constraints) -> tuple[State, NextTokens]:
    """One more token for every row that runs."""
    logits, context = extend(model, params, state.context, state.last_token, state.reasons == RUNNING)
    return sample_next(dataclasses.replace(state, context=context), logits, constraints)


def steps(
    model: VisionLanguageModel, params: Any, state: State, constraints: Constraints, most: Array, *, room: int
) -> tuple[State, NextTokens, Array]:
    """Up to `most` steps, fewer where all rows are done before.

    Args:
      most: [] int32, at most `room`.
      room: of the tokens that are returned.

    Returns:
      the state, the tokens [B, new], and how many of their columns were filled.
    """
    rows = state.last_token.shape[0]
    blank = NextTokens(tokens=jnp.full((rows, room), constraints.pad, jnp.int32), log_probabilities=jnp.zeros((rows, room)))

    def goes_on(carry: tuple[State, NextTokens, Array]) -> Array:
        state, _, done = carry
        return (done < most) & jnp.any(state.reasons == RUNNING)

    def one(carry: tuple[State, NextTokens, Array]) -> tuple[State, NextTokens, Array]:
        state, out, done = carry
        state, next_tokens = step(model, params, state, constraints)
        put = lambda old, new: jax.lax.dynamic_update_slice(old, new[:, None], (0, done))
        return state, jax.tree.map(put, out, next_tokens), done + 1

    return jax.lax.while_loop(goes_on, one, (state, blank, jnp.zeros((), jnp.int32)))


def sample_next(state: State, logits: Array, constraints: Constraints) -> tuple[State, NextTokens]:
    """The next token of every row that runs, from its logits [B, V]."""
    runs, row_settings = state.reasons == RUNNING, state.row_settings
    penalised = penalise(logits, state.used_tokens, row_settings.sampling.repetition_penalty)
    token = sample(jnp.where(constraints.allowed, penalised, -jnp.inf), row_settings.sampling, state.count)
    token = jnp.where(runs, token, constraints.pad)
    chosen = jnp.take_along_axis(logits, token[:, None], axis=-1)[:, 0]
    log_probability = jnp.where(runs, chosen - jax.nn.logsumexp(logits, axis=-1), 0.0)
    recent_tokens = jnp.concatenate([state.recent_tokens[:, 1:], token[:, None]], axis=1)

    hits = (row_settings.stops == STOP_WILDCARD) | (row_settings.stops == recent_tokens[:, None])
    stopped = jnp.any(jnp.all(hits, axis=-1), axis=-1)
    reason = jnp.where(state.count + 1 >= row_settings.limits, LIMIT, RUNNING)
    reason = jnp.where(stopped, STOP_SEQUENCE, reason)
    reason = jnp.where(jnp.isin(token, constraints.ends), END_TOKEN, reason)
    new = dataclasses.replace(
        state,
        last_token=token,
        count=state.count + runs,
        recent_tokens=recent_tokens,
        used_tokens=state.used_tokens.at[jnp.arange(token.shape[0]), token].set(True),
        reasons=jnp.where(runs, reason, state.reasons).astype(jnp.int32),
    )
    return _placed(new), NextTokens(tokens=token, log_probabilities=log_probability)


def repeat_rows(prompt: Prefilled, times: int) -> Prefilled:
    """Every row so many times, one after the other."""
    return map_rows(lambda x, axis: jnp.repeat(x, times, axis=axis), prompt)


def map_rows(fn: Callable[..., Array], tree: Any, *others: Any) -> Any:
    """`fn(array, *arrays of the others, axis=that of the rows)` of every array: of caches as they say, else the first axis."""

    def of(node: Any, *rest: Any) -> Any:
        return node.map_rows(fn, *rest) if _is_cache(node) else fn(node, *rest, axis=0)

    return jax.tree.map(of, tree, *others, is_leaf=_is_cache)


def _is_cache(node: Any) -> bool:
    return hasattr(node, "map_rows")


def _placed(state: State) -> State:
    """Rows keep their place on the mesh from step to step, so that the next call finds the program compiled."""
    lay = lambda x: x.placed() if _is_cache(x) else constrain(x, "batch", *(None,) * (x.ndim - 1))
    return dataclasses.replace(
        jax.tree.map(lay, state, is_leaf=_is_cache), used_tokens=constrain(state.used_tokens, "batch", "vocab")
    )
