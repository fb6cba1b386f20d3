"""The whole of generation as one program: images -> prompt -> a loop of one-token steps with a cache.

The prompts are a `Batch` padded on the left, without targets; a row that is only padding has segments 0 and a limit of 0.
Without pictures in any row `images` is None.

Shapes come in buckets (`buckets.py`), prompts are padded on the left, and everything else is an array: a second request of
similar size compiles nothing. Rows that are done wait for the others; the loop ends with the last of them.

Axis letters: B rows, M image slots, F frames, H x W pixels, T prompt tokens, N new tokens, V vocabulary, R visual tokens of a
slot, E end tokens, K stop sequences of W tokens, G gated layers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from vlm_jax.data.batch import Batch
from vlm_jax.generation.sampling import Sampling, penalise, sample
from vlm_jax.generation.streaming import deliver
from vlm_jax.layers.decoder import CACHE_AXES, Cache, empty_cache
from vlm_jax.models.vlm import VisionLanguageModel
from vlm_jax.sharding import constrain

Array = jax.Array

RUNNING, END_TOKEN, STOP_SEQUENCE, LIMIT, CANCELLED = range(5)
ANY, NEVER = -1, -2  # in `Rules.stops`


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rules:
    """What may be generated, and when it ends."""

    allowed: Array  # [V] bool
    ends: Array  # [E] int32, any of them ends a row
    stops: Array  # [K, W] int32, so does any of these sequences, aligned right; `ANY` in front, `NEVER` for an unused one
    limits: Array  # [B] int32, tokens a row may have
    pad: Array  # [] int32, what stands after the end


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Generated:
    tokens: Array  # [B, N] int32, the end token included, padding after it
    log_probabilities: Array  # [B, N] float32, the model's own, before temperature and restrictions; 0 after the end
    lengths: Array  # [B] int32
    reasons: Array  # [B] int32: END_TOKEN, STOP_SEQUENCE, LIMIT or CANCELLED


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Progress:
    count: Array  # [] int32, tokens generated so far by a row that still runs
    last: Array  # [B] int32, the newest token
    tail: Array  # [B, W] int32, the newest W tokens
    cache: Cache
    seen: Array  # [B, V] bool, the tokens so far, the prompt's among them
    out: Generated


@dataclasses.dataclass(frozen=True)
class Started:
    """The prompt read, and what every further token needs."""

    logits: Array  # [B, V] float32, of the first new token
    cache: Cache
    seen: Array  # [B, V] bool, the prompt's tokens
    step: Callable[[Array, Array, Cache], tuple[Array, Cache]]  # newest tokens [B], how many are new, cache -> logits, cache


def start(model: VisionLanguageModel, new: int, params: Any, prompts: Batch, beams: int = 1) -> Started:
    """Reads the prompts, with room for `new` tokens; from there on, each row `beams` times, one after the other.

    New tokens see the images that the prompt's last token sees.
    """
    apply = lambda method, *args: model.apply({"params": params}, *args, method=method)
    visual, images, slots = _images(model, params, prompts)
    rows, length = prompts.tokens.shape
    cache = empty_cache(model.config.language, rows, length + new, model.dtype)
    media = prompts.media_first, prompts.media_last
    x = apply("embed", prompts.tokens, prompts.positions, prompts.visual, visual)
    inputs = (x, prompts.positions, prompts.segments, *media, cache, images, slots)
    hidden, cache, _ = model.apply({"params": params}, *inputs, prefix_end=prompts.prefix_end, method="step")
    logits = apply("logits", hidden[:, -1:])[:, -1]
    vocabulary = logits.shape[-1]
    # Padding is written behind the vocabulary, where it is dropped.
    written = jnp.where(prompts.segments > 0, prompts.tokens, vocabulary)
    seen = jnp.zeros((rows, vocabulary), bool).at[jnp.arange(rows)[:, None], written].set(True, mode="drop")

    again = lambda x, axis=0: jnp.repeat(x, beams, axis=axis) if beams > 1 else x
    first, last = (again(m[:, -1:]) for m in media)
    begin, segments = again(prompts.positions[:, -1:] + 1), again(prompts.segments[:, -1:])
    images = jax.tree.map(lambda kv: again(kv, axis=kv.ndim - 4), images)
    keys, values = again(cache.keys, axis=1), again(cache.values, axis=1)
    cache = Cache(keys, values, again(cache.positions), again(cache.segments), cache.used)

    def step(tokens: Array, count: Array, cache: Cache) -> tuple[Array, Cache]:
        positions = begin + count - 1
        x = apply("embed", tokens[:, None], positions)
        hidden, cache, _ = apply("step", x, positions, segments, first, last, cache, images, slots)
        return apply("logits", hidden)[:, -1], _lay(cache)

    return Started(again(logits), _lay(cache), again(seen), step)


def generate(
    model: VisionLanguageModel, new: int, params: Any, prompts: Batch, sampling: Sampling, rules: Rules, stream: Any = None
) -> Generated:
    """Up to `new` tokens for every prompt.

    Args:
      new: N; no limit in `rules` is above it.
      stream: [] int32, the number of an open `streaming.Stream` that gets every token at once; None: none.
    """
    started = start(model, new, params, prompts)
    rows = prompts.tokens.shape[0]

    def running(progress: _Progress) -> Array:
        return jnp.any(progress.out.reasons == RUNNING)

    def step(progress: _Progress) -> _Progress:
        logits, cache = started.step(progress.last, progress.count, progress.cache)
        return _pick(dataclasses.replace(progress, cache=cache), logits, sampling, rules, stream)

    nothing = Generated(
        tokens=jnp.full((rows, new), rules.pad, jnp.int32),
        log_probabilities=jnp.zeros((rows, new), jnp.float32),
        lengths=jnp.zeros(rows, jnp.int32),
        reasons=jnp.where(rules.limits > 0, RUNNING, LIMIT),
    )
    blank = jnp.full(rows, NEVER, jnp.int32)
    tail = jnp.full((rows, rules.stops.shape[1]), NEVER, jnp.int32)
    progress = _Progress(jnp.zeros((), jnp.int32), blank, tail, started.cache, started.seen, nothing)
    progress = _pick(progress, started.logits, sampling, rules, stream)
    return jax.lax.while_loop(running, step, progress).out


def _images(model: VisionLanguageModel, params: Any, prompts: Batch) -> tuple[Any, Any, int]:
    """The visual tokens, the gated layers' keys and values of them, and the number of slots they lie in."""
    visual = model.apply({"params": params}, prompts, method="visual_tokens")
    if visual is None or not model.uses_cross_attention:
        return visual, None, 0
    keys_values = model.apply({"params": params}, visual, method="keys_values")
    names = ("layers", "batch", "length", "heads", "head")
    return visual, jax.tree.map(lambda x: constrain(x, *names[-x.ndim :]), keys_values), visual.shape[1]


def _lay(cache: Cache) -> Cache:
    """The cache keeps its place on the mesh from step to step."""
    keys, values = (constrain(x, *CACHE_AXES) for x in (cache.keys, cache.values))
    return dataclasses.replace(cache, keys=keys, values=values)


def _pick(progress: _Progress, logits: Array, sampling: Sampling, rules: Rules, stream: Any) -> _Progress:
    """One more token for every row that runs."""
    count, out = progress.count, progress.out
    runs = out.reasons == RUNNING
    penalised = penalise(logits, progress.seen, sampling.repetition_penalty)
    token = sample(jnp.where(rules.allowed, penalised, -jnp.inf), sampling, count)
    token = jnp.where(runs, token, rules.pad)
    chosen = jnp.take_along_axis(logits, token[:, None], axis=-1)[:, 0]
    log_probability = jnp.where(runs, chosen - jax.nn.logsumexp(logits, axis=-1), 0.0)
    tail = jnp.concatenate([progress.tail[:, 1:], token[:, None]], axis=1)

    stopped = jnp.any(jnp.all((rules.stops == ANY) | (rules.stops == tail[:, None]), axis=-1), axis=-1)
    reason = jnp.where(count + 1 >= rules.limits, LIMIT, RUNNING)
    reason = jnp.where(stopped, STOP_SEQUENCE, reason)
    reason = jnp.where(jnp.isin(token, rules.ends), END_TOKEN, reason)
    reason = jnp.where(runs, reason, out.reasons)
    if stream is not None:
        cancelled = deliver(stream, token, runs)
        reason = jnp.where((reason == RUNNING) & cancelled, CANCELLED, reason)

    put = lambda old, new: jax.lax.dynamic_update_slice(old, new[:, None], (0, count))
    generated = Generated(
        tokens=put(out.tokens, token),
        log_probabilities=put(out.log_probabilities, log_probability),
        lengths=out.lengths + runs,
        reasons=reason,
    )
    seen = progress.seen.at[jnp.arange(token.shape[0]), token].set(True)
    return _Progress(count + 1, token, tail, progress.cache, seen, generated)
