"""Answers requests: lays them out, groups them by length, runs the compiled program, and turns tokens into text."""

from __future__ import annotations

import copy
import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from vlm_jax.batch import Batch
from vlm_jax.config.generation import Settings
from vlm_jax.errors import RequestError
from vlm_jax.generation import beam, decode
from vlm_jax.generation.buckets import SLOTS, STOP_WIDTH, STOPS, bucket
from vlm_jax.generation.programs import STEPS, Programs
from vlm_jax.generation.prompts import Prompt, place
from vlm_jax.generation.request import Request
from vlm_jax.generation.sampling import Sampling
from vlm_jax.generation.text import TextStream, cut, stop_sequences
from vlm_jax.models.vlm import VisionLanguageModel
from vlm_jax.processing.pictures import ImageError
from vlm_jax.processing.processor import LANGUAGE_ONLY, Processor
from vlm_jax.sharding import batch_sharding

DEFAULTS = Settings()


@dataclasses.dataclass(frozen=True, slots=True)
class Answer:
    text: str  # without white space around it
    tokens: list[int]  # the end token included; after a stop string those that reach to it
    log_probabilities: list[float]  # of the tokens, the model's own: before temperature, top-k and top-p
    finish_reason: str  # "end_token", "stop_string", "max_new_tokens" or "max_positions"
    prompt_tokens: int


@dataclasses.dataclass(frozen=True, slots=True)
class _Progress:
    count: np.ndarray  # [B]
    reasons: np.ndarray  # [B]


class Generator:
    """A model with its parameters and processor, ready to answer.

    The parameters are taken over, see `Programs`; of a model in training, which keeps its own, `with_params` gets them.

    Attributes:
      programs: what runs the model; rows: at most so many requests are answered at once.
    """

    def __init__(
        self,
        model: VisionLanguageModel,
        params: Any,
        processor: Processor,
        mesh: Mesh,
        rows: int = 16,
        *,
        take_over: bool = True,
    ) -> None:
        """
        Args:
          take_over: False: the parameters stay the caller's; abstract ones will do, until `with_params` brings others.
        """
        self.model, self.processor, self.mesh, self.rows = model, processor, mesh, rows
        self.programs = Programs(model, params, mesh=mesh, take_over=take_over)
        self._allowed = processor.allowed(model.config.language.vocab_size)

    @property
    def _max_positions(self) -> float:
        """Tokens that the model reads, with the answer."""
        most = self.model.config.language.max_positions
        return math.inf if most is None else most

    @property
    def params(self) -> Any:
        """Nested dicts, layers stacked, as every other place has them. Of a large model on a CPU it is a copy."""
        return self.programs.params

    def with_params(self, held: Any) -> Generator:
        """The same with other parameters, see `Programs.with_params`."""
        other = copy.copy(self)
        other.programs = self.programs.with_params(held)
        return other

    def generate(self, requests: list[Request], settings: Settings = DEFAULTS) -> list[Answer]:
        """The answers, in the order of the requests.

        Raises:
          RequestError: a request that does not fit the model; ImageError: a picture that cannot be read.
        """
        answers: dict[int, Answer] = {}
        prompts = [self.prompt(request, index, settings) for index, request in enumerate(requests)]
        for done in self.batches(prompts, settings):
            answers |= done
        return [answers[index] for index in range(len(requests))]

    def batches(
        self,
        prompts: list[Prompt],
        settings: Settings = DEFAULTS,
        *,
        refuse: Callable[[int, Exception], None] | None = None,
    ) -> Iterator[dict[int, Answer]]:
        """The same, batch by batch: {number of the prompt: answer}. Prompts of similar length go together.

        Args:
          refuse: called with the number of each prompt whose pictures cannot be used, and why; None: the first raises.
        """
        size = lambda i: (bucket(len(prompts[i].request.media)), prompts[i].length)
        order = sorted(range(len(prompts)), key=size)
        for start in range(0, len(order), self.rows):
            chosen = order[start : start + self.rows]
            try:
                answers = self._answer([prompts[i] for i in chosen], settings)
            except (RequestError, ImageError):
                if refuse is None:
                    raise
                chosen = [i for i in chosen if self._can_be_placed(prompts[i], functools.partial(refuse, i))]
                answers = self._answer([prompts[i] for i in chosen], settings) if chosen else []
            yield dict(zip(chosen, answers, strict=True))

    def _can_be_placed(self, prompt: Prompt, refuse: Callable[[Exception], None]) -> bool:
        try:
            self.place([prompt])
        except (RequestError, ImageError) as error:
            refuse(error)
            return False
        return True

    def stream(self, request: Request, settings: Settings = DEFAULTS) -> Iterator[str]:
        """The answer piece by piece, as it is generated; the pieces together are `Answer.text`.

        Raises:
          RequestError: several beams.
        """
        if settings.beams > 1:
            raise RequestError(f"beams={settings.beams}: the best answer is known at the end only; do not stream it")
        prompt = self.prompt(request, 0, settings)
        text = TextStream(self.processor.tokenizer, self.processor.ends, settings.stop)
        for next_tokens, _ in self._pieces([prompt], settings, most=1):
            for token in next_tokens.tokens[0]:
                if (piece := text.add(int(token))) or text.done:
                    yield piece
            if text.done:
                return
        yield text.close()

    def prompt(self, request: Request, index: int, settings: Settings) -> Prompt:
        """Lays out a request.

        Raises:
          RequestError: it is too long, or has pictures for a model that does not see.
        """
        if request.media and not self.model.has_vision:
            raise RequestError(LANGUAGE_ONLY)
        layout = self.processor.lay_out(request.turns, request.sizes, open=True)
        most = self._max_positions
        if len(layout.tokens) >= most:
            raise RequestError(
                f"the prompt is {len(layout.tokens)} tokens long, but the model reads at most {most} with the answer: "
                "shorten it, or give fewer examples"
            )
        seed = index if request.seed is None else request.seed
        row_seed = np.random.SeedSequence([settings.seed, seed]).generate_state(1)[0]
        return Prompt(request, layout, int(row_seed))

    def place(self, prompts: list[Prompt]) -> Batch:
        """Prompts -> one batch on the mesh."""
        return place(prompts, self.processor, self.model.config, self.mesh)

    def _answer(self, prompts: list[Prompt], settings: Settings) -> list[Answer]:
        if settings.beams > 1:
            found = self._search(prompts, settings)
        else:
            pieces = list(self._pieces(prompts, settings, most=STEPS))
            joined = lambda name: np.concatenate([getattr(next_tokens, name) for next_tokens, _ in pieces], axis=1)
            _, state = pieces[-1]
            found = beam.Generated(joined("tokens"), joined("log_probabilities"), state.count, state.reasons)
        return [self._finish(prompt, settings, found, row) for row, prompt in enumerate(prompts)]

    def started(
        self, prompts: list[Prompt], settings: Settings
    ) -> tuple[tuple[decode.State, decode.NextTokens], decode.Constraints]:
        """The state of the prompts' rows with the first new token of each, and the constraints that further steps take."""
        batch, limits, constraints, place = self._ready(prompts, settings)
        rows = len(limits)
        fill = lambda value, dtype=np.float32: np.full(rows, value, dtype)
        seeds = np.zeros(rows, np.uint32)
        seeds[: len(prompts)] = [prompt.seed for prompt in prompts]
        sampling = Sampling(
            temperature=fill(settings.temperature),
            top_k=fill(settings.top_k, np.int32),
            top_p=fill(settings.top_p),
            repetition_penalty=fill(settings.repetition_penalty),
            seeds=seeds,
        )
        stops = np.repeat(self._stops(settings)[None], rows, axis=0)
        row_settings = place(decode.RowSettings(sampling=sampling, limits=limits, stops=stops), batch_sharding(self.mesh))
        room = max(prompt.length + limit for prompt, limit in zip(prompts, limits.tolist(), strict=False))
        slots = bucket(max(room, batch.tokens.shape[1]), SLOTS)
        return self.programs.begin(batch, row_settings, constraints, slots=slots), constraints

    def _pieces(self, prompts: list[Prompt], settings: Settings, *, most: int) -> Iterator[tuple[decode.NextTokens, _Progress]]:
        """The new tokens [B, new] of all rows, `most` at a time after the first, until every row is done."""
        (state, next_tokens), constraints = self.started(prompts, settings)
        next_tokens = jax.tree.map(lambda x: x[:, None], jax.device_get(next_tokens))
        while True:
            progress = _Progress(*jax.device_get((state.count, state.reasons)))
            yield next_tokens, progress
            if not np.any(progress.reasons == decode.RUNNING):
                return
            state, next_tokens = self.programs.more(state, constraints, most=most)

    def _search(self, prompts: list[Prompt], settings: Settings) -> beam.Generated:
        batch, limits, constraints, place = self._ready(prompts, settings)
        penalty = np.full(len(limits), settings.repetition_penalty, np.float32)
        search = beam.BeamSettings(np.float32(settings.length_penalty), np.bool_(settings.early_stopping), penalty)
        room = bucket(int(limits.max()), STEPS)
        return self.programs.search(batch, place(search), constraints, place(limits), room=room, beams=settings.beams)

    def _ready(self, prompts: list[Prompt], settings: Settings) -> tuple[Batch, np.ndarray, decode.Constraints, Any]:
        """The prompts on the mesh, how many tokens each row may have, the constraints, and how other arrays are put there."""
        batch = self.place(prompts)
        most = self._max_positions
        limits = np.zeros(batch.tokens.shape[0], np.int32)
        limits[: len(prompts)] = [min(settings.max_new_tokens, most - prompt.length) for prompt in prompts]
        everywhere = NamedSharding(self.mesh, PartitionSpec())
        place = lambda tree, sharding=everywhere: jax.device_put(tree, sharding)
        ends = np.asarray(sorted(self.processor.ends), np.int32)
        return (
            batch,
            limits,
            place(decode.Constraints(allowed=self._allowed, ends=ends, pad=np.int32(self.processor.pad_id))),
            place,
        )

    def _stops(self, settings: Settings) -> np.ndarray:
        """[sequences, width] of `decode.RowSettings`."""
        sequences = stop_sequences(self.processor.tokenizer, settings.stop)
        width = bucket(max(map(len, sequences), default=1), STOP_WIDTH)
        stops = np.full((bucket(max(len(sequences), 1), STOPS), width), decode.STOP_UNUSED, np.int32)
        for row, sequence in zip(stops, sequences, strict=False):
            row[:] = decode.STOP_WILDCARD
            row[width - len(sequence) :] = sequence
        return stops

    def _finish(self, prompt: Prompt, settings: Settings, out: beam.Generated, row: int) -> Answer:
        length, reason = int(out.lengths[row]), int(out.reasons[row])
        ids = out.tokens[row, :length].tolist()
        body = ids[:-1] if reason == decode.END_TOKEN else ids
        text, needed, stopped = cut(self.processor.tokenizer, body, settings.stop)
        names = {
            decode.END_TOKEN: "end_token",
            decode.STOP_SEQUENCE: "stop_string",
            decode.LIMIT: "max_new_tokens" if length == settings.max_new_tokens else "max_positions",
        }
        length = needed if stopped else length
        return Answer(
            text=text.strip(),
            tokens=ids[:length],
            log_probabilities=out.log_probabilities[row, :length].tolist(),
            finish_reason="stop_string" if stopped else names[reason],
            prompt_tokens=prompt.length,
        )
