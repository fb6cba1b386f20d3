"""The two towers of a run that trains, as its evaluators use them: pictures and texts in, vectors of length 1 out."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from vlm_jax.data.example import Example
from vlm_jax.processing.pair import caption_of
from vlm_jax.sharding import batch_sharding
from vlm_jax.training.step import Trainer, TrainState


class Towers:
    """All processes of a run call it with the same, and all get the same."""

    def __init__(self, trainer: Trainer, processor: Any, *, evaluator: str) -> None:
        """
        Args:
          evaluator: the name of who asks, for messages.

        Raises:
          ValueError: the run has no two towers.
        """
        if processor.answers:
            raise ValueError(f"config.evaluators: {evaluator} is for two towers (config.data.layout=pair)")
        self._processor, self._mesh, self._rows = processor, trainer.mesh, trainer.config.data.rows
        path = f"{trainer.config.model.vision_path}/"
        self.frozen = all(rule.frozen for name, rule in trainer.rules.items() if name.startswith(path))
        self._features, (self._images, self._texts) = trainer.cached_features, _programs(trainer)

    def features(self, state: TrainState, examples: Sequence[Example]) -> np.ndarray:
        """Of the examples' first pictures, what is the same as long as the image encoder is: `ImageTower.cached_features`.

        Raises:
          ImageError: a picture cannot be read.
        """
        pixels = lambda part: self._processor.pixels([example.media[0][0] for example in part])
        return self._run(self._features, state, examples, pixels)

    def embed_images(self, state: TrainState, features: np.ndarray) -> np.ndarray:
        """`features` -> [B, Z] float32."""
        return self._run(self._images, state, features, np.asarray)

    def embed_texts(self, state: TrainState, texts: Sequence[str]) -> np.ndarray:
        """[texts, Z] float32."""
        return self._run(self._texts, state, texts, self._processor.tokens)

    def _run(self, program: Any, state: TrainState, inputs: Sequence[Any], prepare: Any) -> np.ndarray:
        """A batch at a time; the last is filled up, so that everything runs in one compiled program."""
        sharding, found, params = batch_sharding(self._mesh), [], state.params
        for start in range(0, len(inputs), self._rows):
            part = prepare(inputs[start : start + self._rows])
            part = np.concatenate([part, np.repeat(part[-1:], self._rows - len(part), axis=0)])
            placed = jax.make_array_from_callback(part.shape, sharding, lambda index, part=part: part[index])
            found.append(np.asarray(program(params, placed), np.float32)[: len(inputs) - start])
        return np.concatenate(found)


@functools.lru_cache(1)  # the evaluators of a run share them
def _programs(trainer: Trainer) -> tuple[Any, ...]:
    replicated = NamedSharding(trainer.mesh, PartitionSpec())

    def compiled(method: str) -> Any:
        run = lambda params, inputs: trainer.model.apply({"params": params}, inputs, method=method)
        return jax.jit(run, out_shardings=replicated)

    return compiled("embed_cached"), compiled("embed_texts")


class Pictures:
    """The first pictures of some examples, and their captions. Their features are kept if the image encoder is frozen."""

    def __init__(self, towers: Towers, examples: Sequence[Example]) -> None:
        self._towers, self._examples, self._kept = towers, examples, None
        self.captions = [caption_of(example.conversations[0]) for example in examples]

    def embed(self, state: TrainState) -> np.ndarray:
        """[B, Z] float32 of length 1."""
        features = self._kept if self._kept is not None else self._towers.features(state, self._examples)
        if self._towers.frozen:
            self._kept = features
        return self._towers.embed_images(state, features)
