"""Caption retrieval by likelihood: which of all held-out captions a model that writes gives the highest probability.

A picture is encoded and its prompt read once; every candidate then goes on from that cache. The candidates are all distinct
captions of the held-out examples, and the pictures one for each of them: where several have the same caption, the first.

A language model also prefers captions that are short or common, whatever it sees. So there are two scores, and both are
reported: log p(caption | picture), as `r1`, `r5`, `r10`, and log p(caption | picture) - log p(caption), what the picture adds
(their pointwise mutual information), as `prior_r1`, `prior_r5`, `prior_r10`. A caption's prior p(caption) is the mean of
p(caption | picture) over the pictures that are ranked (Lin et al. 2024, Revisiting the Role of Language Priors in
Vision-Language Models, take it from sampled pictures). From a grey picture it would be a guess: no model was trained on one.
"""

from __future__ import annotations

import functools
import logging
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from vlm_jax.batch import Batch
from vlm_jax.config import RankingConfig
from vlm_jax.evaluation.held_out import HeldOut, evenly, held_out_questions, with_shots
from vlm_jax.evaluation.retrieval import recall_at
from vlm_jax.generation.buckets import row_bucket
from vlm_jax.generation.decode import Context, prefill
from vlm_jax.generation.prompts import Prompt, place
from vlm_jax.processing.layout import Layout, targets_of
from vlm_jax.processing.processor import Processor, blanked
from vlm_jax.progress import Countdown
from vlm_jax.sharding import batch_sharding, batch_shards, constrain
from vlm_jax.training.evaluator import EVALUATORS, Evaluation, RunParts
from vlm_jax.training.objectives.next_token import chunked_scores
from vlm_jax.training.step import TrainState

Array = jax.Array
log = logging.getLogger(__name__)

KS = (1, 5, 10)
STEP = 4  # lengths of captions are rounded up to a multiple: one compiled program for each
LOGITS = 64 * 2**20  # bytes that a device's logits may take


@EVALUATORS.add(RankingConfig)
class Ranking:
    metrics = (*(f"r{k}" for k in KS), *(f"prior_r{k}" for k in KS))

    def __init__(self, config: RankingConfig, parts: RunParts) -> None:
        """
        Raises:
          ValueError: a model or data that have no captions to rank.
        """
        self._config, self._trainer = config, parts.trainer
        if not parts.config.model.answers:
            raise ValueError("ranking: the model writes no captions: take this evaluator out of config.evaluators")
        self._processor = parts.processor
        questions = held_out_questions(parts.held_out, skip=parts.config.data.source.bad_lines == "skip")
        self._captions, pictures = _distinct(questions, config.captions)
        if len(self._captions) < 2:
            raise ValueError(
                f"ranking: the held-out examples have {len(self._captions)} distinct captions; expected at least 2"
            )
        asked = [pictures[place] for place in evenly(len(pictures), config.pictures)]
        self._questions = with_shots(asked, config.shots, pool=questions, seed=config.seed)
        numbers = {caption: number for number, caption in enumerate(self._captions)}
        self._right = np.zeros((len(self._questions), len(self._captions)), bool)
        for row, question in enumerate(self._questions):
            self._right[row, [numbers[answer] for answer in question.answers if answer in numbers]] = True

    def evaluate(self, state: TrainState) -> Evaluation:
        scores, beyond = self.scores(state)
        found = recall_at(scores, self._right, KS)
        found |= {f"prior_{name}": value for name, value in recall_at(beyond, self._right, KS).items()}
        said = lambda prefix: "/".join(f"{found[f'{prefix}r{k}']:.3f}" for k in KS)
        line = f"R@1/5/10 {said('')}, beyond a caption's prior {said('prior_')}: {len(self._questions)} pictures"
        return Evaluation(metrics=found, line=f"{line}, {len(self._captions)} captions{' (blank)' * self._config.blank}")

    def scores(self, state: TrainState) -> tuple[np.ndarray, np.ndarray]:
        """The log-likelihood of every candidate given every picture, and how far it is above the candidate's prior.

        Returns:
          [pictures, captions] each.
        """
        tails = _Tails(self._processor, self._captions)
        prompts = [tails.prompt(question) for question in self._questions]
        scores = self._scored(state, prompts, tails, blanked(self._processor) if self._config.blank else self._processor)
        most = scores.max(axis=0)
        beyond = scores - most - np.log(np.mean(np.exp(scores - most), axis=0))
        share = tails.counts(prompts) if self._config.score == "mean" else 1
        return scores / share, beyond / share

    def _scored(self, state: TrainState, prompts: list[Prompt], tails: _Tails, processor: Processor) -> np.ndarray:
        mesh, model = self._trainer.mesh, self._trainer.model
        size = row_bucket(min(self._config.rows, len(prompts)), batch_shards(mesh))
        params, found = state.params, []
        countdown = Countdown(
            log.info, f"{self._config.label}: {{}} pairs of picture and caption", len(prompts) * len(self._captions)
        )
        for start in range(0, len(prompts), size):
            some = prompts[start : start + size]
            filled = some + some[-1:] * (size - len(some))  # one program for all
            logits, context = _read(model, params, place(filled, processor, model.config, mesh))
            columns = []
            for caption in range(len(self._captions)):
                batch = jax.device_put(tails.batch(filled, caption), batch_sharding(mesh))
                # One at a time: each has a copy of the cache.
                columns.append(jax.device_get(_score(model, params, logits, context, *batch)))
                countdown.at(start * len(self._captions) + len(some) * (caption + 1))
            found.append(np.stack(columns, axis=1)[: len(some)])
        return np.concatenate(found)


def _distinct(questions: list[HeldOut], most: int) -> tuple[list[str], list[HeldOut]]:
    """The candidates, and a picture for each: the first that has the caption, unless one that stands before it has it too."""
    captions = list(dict.fromkeys(answer for question in questions for answer in question.answers))
    captions = [captions[place] for place in evenly(len(captions), most)]
    wanted, kept = set(captions), []
    for question in questions:
        if wanted.intersection(question.answers):
            wanted -= set(question.answers)
            kept.append(question)
    return captions, kept


class _Tails:
    """The candidates as they are written behind the prompts, by the run's own processor."""

    def __init__(self, processor: Processor, captions: list[str]) -> None:
        self._processor, self._captions = processor, captions
        # Of the prompts' texts and captions: tokens [n - 1], targets [n], weights [n].
        self._known: dict[Any, list[tuple[np.ndarray, np.ndarray, np.ndarray]]] = {}

    def prompt(self, question: HeldOut) -> Prompt:
        request = question.request
        if request.turns not in self._known:
            before = self._processor.write(request.turns, open=True).tokens
            self._known[request.turns] = [self._tail(question, before, caption) for caption in self._captions]
        return Prompt(request, self._processor.lay_out(request.turns, request.sizes, open=True), seed=0)

    def _tail(self, question: HeldOut, before: np.ndarray, caption: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        written = self._processor.write(question.with_answer(caption).turns)
        if not np.array_equal(written.tokens[: len(before)], before):
            raise ValueError(f"ranking: {question.id}: the template writes the prompt differently once it is answered")
        tokens, flags = written.tokens[len(before) - 1 :], written.flags[len(before) - 1 :]
        zeros = np.zeros_like(tokens)
        targets, weights = targets_of(Layout(tokens, flags, zeros, zeros, zeros), self._processor.spread.end_id)
        count = int(np.flatnonzero(weights)[-1]) + 1
        return tokens[1:count], targets[:count], weights[:count]

    def counts(self, prompts: list[Prompt]) -> np.ndarray:
        """Tokens that are scored: [prompts, captions]."""
        return np.asarray([[tail[2].sum() for tail in self._known[prompt.request.turns]] for prompt in prompts])

    def batch(self, prompts: list[Prompt], caption: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Of one caption behind every prompt: tokens [B, T], segments [B, T], targets [B, T + 1], weights [B, T + 1]."""
        tails = [self._known[prompt.request.turns][caption] for prompt in prompts]
        length = max(-(-max(len(tail[0]) for tail in tails) // STEP), 1) * STEP
        tokens, segments, targets = (np.zeros((len(tails), length + more), np.int32) for more in (0, 0, 1))
        weights = np.zeros((len(tails), length + 1), np.float32)
        for row, (of_tokens, of_targets, of_weights) in enumerate(tails):
            tokens[row, : len(of_tokens)], segments[row, : len(of_tokens)] = of_tokens, 1
            targets[row, : len(of_targets)], weights[row, : len(of_weights)] = of_targets, of_weights
        return tokens, segments, targets, weights


@functools.partial(jax.jit, static_argnums=0)
def _read(model: nn.Module, params: Any, prompts: Batch) -> tuple[Array, Context]:
    """Prompts -> logits of the token that follows [B, V], and what they go on from."""
    prefilled = prefill(model, params, prompts)
    return prefilled.logits, prefilled.context


@functools.partial(jax.jit, static_argnums=0)
def _score(
    model: nn.Module,
    params: Any,
    logits: Array,
    context: Context,
    tokens: Array,
    segments: Array,
    targets: Array,
    weights: Array,
) -> Array:
    """The log-probability [B] of what follows the prompts.

    Args:
      logits: [B, V], behind the prompt.
      tokens, segments: [B, T] int32.
      targets, weights: [B, T + 1], what the prompt's last token and these tokens predict.
    """
    rows, length = tokens.shape
    apply = lambda *args, method, **named: model.apply({"params": params}, *args, **named, method=method)
    positions = context.cache.used[:, None] + jnp.arange(length)
    wide = lambda column: jnp.broadcast_to(column[:, None], (rows, length))
    batch = Batch(
        tokens=tokens,
        positions=positions,
        segments=segments,
        media_first=wide(context.media_first),
        media_last=wide(context.media_last),
        prefix_end=positions,
    )
    cache = context.cache.with_slots(context.cache.positions.shape[1] + length)
    hidden = apply(batch, media_cache=context.media_cache, cache=cache, method="forward").hidden
    head = lambda x: apply(x, method="logits")
    of = dict(learned=weights[:, 1:] > 0, vocabulary=logits.shape[-1], most=LOGITS)
    nll, _ = chunked_scores(head, hidden, targets[:, 1:], **of)
    first = jnp.take_along_axis(jax.nn.log_softmax(logits), targets[:, :1], axis=1)[:, 0]
    # On all devices, so that every process has it.
    return constrain(first * weights[:, 0] - jnp.sum(nll * weights[:, 1:], axis=1), None)
