"""Answers requests: lays them out, groups them by length, runs the compiled program, and turns tokens into text.

Axis letters: B rows, M image slots, F frames, S the side of the model's square, T prompt tokens, V vocabulary, K stop
sequences of W tokens.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import queue
import threading
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from vlm_jax.config.generation import Settings
from vlm_jax.data.batch import Batch
from vlm_jax.data.rows import put_media, put_sequence
from vlm_jax.errors import RequestError
from vlm_jax.generation import beam, decode
from vlm_jax.generation.buckets import LENGTH, NEW, SIDE_PATCHES, STOP_WIDTH, STOPS, bucket, row_bucket
from vlm_jax.generation.request import Request
from vlm_jax.generation.sampling import Sampling
from vlm_jax.generation.streaming import Stream
from vlm_jax.generation.text import TextStream, cut, stop_sequences
from vlm_jax.generation.unstack import unstack, worth_unstacking
from vlm_jax.models.vlm import VisionLanguageModel
from vlm_jax.processing.layout import Layout
from vlm_jax.processing.processor import Processor
from vlm_jax.sharding import batch_sharding

DEFAULTS = Settings()


@dataclasses.dataclass(frozen=True, slots=True)
class Answer:
    text: str  # without white space around it
    tokens: list[int]  # the end token included; after a stop string those that reach to it
    log_probabilities: list[float]  # of the tokens, the model's own: before temperature, top-k and top-p
    finish_reason: str  # "end_token", "stop_string", "max_new_tokens", "max_positions" or "cancelled"
    prompt_tokens: int


@dataclasses.dataclass(frozen=True, slots=True)
class Prompt:
    """A request as the model reads it."""

    request: Request
    layout: Layout
    seed: int

    @property
    def length(self) -> int:
        return len(self.layout.tokens)


class Generator:
    """A model with its parameters and processor, ready to answer.

    Attributes:
      rows: at most so many requests are answered at once.
    """

    def __init__(
        self,
        model: VisionLanguageModel,
        params: Any,
        processor: Processor,
        mesh: Mesh,
        rows: int = 16,
    ) -> None:
        self.model, self.processor, self.mesh, self.rows = model, processor, mesh, rows
        self.params = unstack(params) if worth_unstacking(params) else params
        self._program = jax.jit(functools.partial(decode.generate, model), static_argnums=0)
        self._beam_program = jax.jit(functools.partial(beam.generate, model), static_argnums=(0, 1))
        self._allowed = processor.allowed(model.config.language.vocab_size)

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

    def batches(self, prompts: list[Prompt], settings: Settings = DEFAULTS) -> Iterator[dict[int, Answer]]:
        """The same, batch by batch: {number of the prompt: answer}. Prompts of similar length go together."""
        size = lambda i: (bucket(len(prompts[i].request.media)), prompts[i].length)
        order = sorted(range(len(prompts)), key=size)
        for start in range(0, len(order), self.rows):
            chosen = order[start : start + self.rows]
            yield dict(zip(chosen, self._answer([prompts[i] for i in chosen], settings), strict=True))

    def stream(self, request: Request, settings: Settings = DEFAULTS) -> Iterator[str]:
        """The answer piece by piece, as it is generated; the pieces together are `Answer.text`.

        Raises:
          RequestError: also on a mesh of several devices, where JAX cannot call back in order.
        """
        if self.mesh.size > 1:
            raise RequestError(f"streaming works on one device, and this mesh has {self.mesh.size}: use generate()")
        if settings.beams > 1:
            raise RequestError(f"beams={settings.beams}: the best answer is known at the end only; do not stream it")
        prompt = self.prompt(request, 0, settings)
        text = TextStream(self.processor.tokenizer, self.processor.ends, settings.stop)
        pieces: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        cancelled = threading.Event()
        failed: list[BaseException] = []

        def on_tokens(tokens: np.ndarray, runs: np.ndarray) -> bool:
            pieces.put(text.add(int(tokens[0])))
            return text.done or cancelled.is_set()

        def work() -> None:
            try:
                with Stream(on_tokens) as stream:
                    self._run([prompt], settings, np.int32(stream.number))
                    stream.check()
                pieces.put(text.close())
            except BaseException as error:  # raised again in the caller's thread
                failed.append(error)
            pieces.put(None)

        worker = threading.Thread(target=work, daemon=True)
        worker.start()
        try:
            while (piece := pieces.get()) is not None:
                if piece:
                    yield piece
        finally:
            cancelled.set()
            worker.join()
        if failed:
            raise failed[0]

    def prompt(self, request: Request, index: int, settings: Settings) -> Prompt:
        """Lays out a request.

        Raises:
          RequestError: it is too long, or has pictures for a model that does not see.
        """
        if request.media and not self.model.has_vision:
            raise RequestError("the request has pictures, but this model is a language model alone: leave them out")
        layout = self.processor.lay_out(request.turns, request.sizes, open=True)
        most = self.model.config.language.max_positions
        if len(layout.tokens) >= most:
            raise RequestError(
                f"the prompt is {len(layout.tokens)} tokens long, but the model reads at most {most} with the answer: "
                "shorten it, or give fewer examples"
            )
        seed = index if request.seed is None else request.seed
        row_seed = np.random.SeedSequence([settings.seed, seed]).generate_state(1)[0]
        return Prompt(request, layout, int(row_seed))

    def place(self, prompts: list[Prompt]) -> Batch:
        """Prompts -> one batch on the mesh, padded on the left, its shapes rounded up to buckets."""
        ways = self.mesh.shape["data"] * self.mesh.shape["fsdp"]
        rows, length = row_bucket(len(prompts), ways), bucket(max(p.length for p in prompts), LENGTH)
        names = ("tokens", "positions", "segments", "media_last", "media_first", "prefix_end")
        arrays = {name: np.zeros((rows, length), np.int32) for name in names}
        arrays["tokens"][:] = self.processor.pad_id
        media = self.processor.media
        pictures = [[media.pixels(medium) for medium in prompt.request.ordered] for prompt in prompts]
        in_sequence = media.tile_tokens > 0
        # A tile whose visual tokens stand in the sequence takes a slot; a medium that is read by cross-attention does.
        slots = bucket(max(sum(map(len, row)) if in_sequence else len(row) for row in pictures))
        if slots:
            frames = 1 if in_sequence else bucket(max(len(tiles) for row in pictures for tiles in row))
            shape = self._picture_size([tile.shape[:2] for row in pictures for tiles in row for tile in tiles])
            arrays["images"] = np.zeros((rows, slots, frames, *shape, 3), np.uint8)
            arrays["frames"] = np.zeros((rows, slots), np.int32)
            if self.model.config.vision.positions == "bucketed":
                arrays["sizes"] = np.zeros((rows, slots, frames, 2), np.int32)
            if in_sequence:
                arrays["visual"] = np.zeros((rows, length), np.int32)
        for row, (prompt, of_prompt) in enumerate(zip(prompts, pictures, strict=True)):
            fields = {name: array[row] for name, array in arrays.items()}
            put_media(fields, of_prompt, slot=0, in_sequence=in_sequence)
            put_sequence(fields, prompt.layout, length - prompt.length, slot=0, segment=1, tile_tokens=media.tile_tokens)
        return jax.device_put(Batch(**{"images": None, "frames": None} | arrays), batch_sharding(self.mesh))

    def _picture_size(self, sizes: list[tuple[int, int]]) -> tuple[int, int]:
        """Height and width that all frames lie in.

        Raises:
          RequestError: they differ from what a vision encoder of one size takes.
        """
        vision = self.model.config.vision
        if vision.positions == "bucketed":
            step = SIDE_PATCHES * vision.patch_size
            return tuple(-(-max(size[axis] for size in sizes) // step) * step for axis in (0, 1))
        expected = sizes[0] if self.model.uses_cross_attention else (vision.image_size, vision.image_size)
        wrong = {f"{height}x{width}" for height, width in sizes if (height, width) != expected}
        if wrong:
            raise RequestError(
                f"the checkpoint's picture processor gives pictures of {', '.join(sorted(wrong))} pixels where the vision "
                f"encoder takes {expected[0]}x{expected[1]}: make squares of them first"
            )
        return expected

    def compiled(self) -> int:
        """How many programs were compiled so far."""
        return self._program._cache_size() + self._beam_program._cache_size()

    def mesh_context(self) -> contextlib.AbstractContextManager[Any]:
        return jax.set_mesh(self.mesh)

    def _answer(self, prompts: list[Prompt], settings: Settings) -> list[Answer]:
        out = self._run(prompts, settings)
        return [self._finish(prompt, settings, out, row) for row, prompt in enumerate(prompts)]

    def _run(self, prompts: list[Prompt], settings: Settings, stream: Any = None) -> decode.Generated:
        batch = self.place(prompts)
        rows, count = batch.tokens.shape[0], len(prompts)
        most = self.model.config.language.max_positions
        limits = np.zeros(rows, np.int32)
        limits[:count] = [min(settings.max_new_tokens, most - p.length) for p in prompts]
        seeds = np.zeros(rows, np.uint32)
        seeds[:count] = [p.seed for p in prompts]
        fill = lambda value, dtype=np.float32: np.full(rows, value, dtype)
        penalty = fill(settings.repetition_penalty)
        if settings.beams > 1:
            choice = beam.Search(np.float32(settings.length_penalty), np.bool_(settings.early_stopping), penalty)
        else:
            top_k = fill(settings.top_k, np.int32)
            choice = Sampling(fill(settings.temperature), top_k, fill(settings.top_p), penalty, seeds)
        ends, pad = np.asarray(sorted(self.processor.ends), np.int32), np.int32(self.processor.pad_id)
        rules = decode.Rules(self._allowed, ends, self._stops(settings), limits, pad)
        choice, rules = jax.device_put((choice, rules), NamedSharding(self.mesh, PartitionSpec()))
        new = bucket(min(settings.max_new_tokens, most), NEW)
        with self.mesh_context():
            if settings.beams > 1:
                return jax.device_get(self._beam_program(new, settings.beams, self.params, batch, choice, rules))
            return jax.device_get(self._program(new, self.params, batch, choice, rules, stream))

    def _stops(self, settings: Settings) -> np.ndarray:
        """[K, W] of `decode.Rules`."""
        sequences = stop_sequences(self.processor.tokenizer, settings.stop)
        width = bucket(max(map(len, sequences), default=1), STOP_WIDTH)
        stops = np.full((bucket(max(len(sequences), 1), STOPS), width), decode.NEVER, np.int32)
        for row, sequence in zip(stops, sequences, strict=False):
            row[:] = decode.ANY
            row[width - len(sequence) :] = sequence
        return stops

    def _finish(self, prompt: Prompt, settings: Settings, out: decode.Generated, row: int) -> Answer:
        length, reason = int(out.lengths[row]), int(out.reasons[row])
        ids = out.tokens[row, :length].tolist()
        body = ids[:-1] if reason == decode.END_TOKEN else ids
        text, needed, stopped = cut(self.processor.tokenizer, body, settings.stop)
        names = {
            decode.END_TOKEN: "end_token",
            decode.STOP_SEQUENCE: "stop_string",
            decode.LIMIT: "max_new_tokens" if length == settings.max_new_tokens else "max_positions",
            decode.CANCELLED: "cancelled",
        }
        length = needed if stopped else length
        return Answer(
            text=text.strip(),
            tokens=ids[:length],
            log_probabilities=out.log_probabilities[row, :length].tolist(),
            finish_reason="stop_string" if stopped else names[reason],
            prompt_tokens=prompt.length,
        )
