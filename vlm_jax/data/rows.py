"""A row's units -> arrays: the pictures decoded, fitted and augmented, the tokens in their places.

Axis letters: B rows, M image slots of a row, F frames of a slot, S the side of the model's square, T tokens of a row.
"""

from __future__ import annotations

import threading
from typing import Any

import numpy as np

from vlm_jax.config import DataConfig
from vlm_jax.data.batch import Batch
from vlm_jax.data.example import DataError, Example, Frame, Source
from vlm_jax.data.images import ImageError, augment, blank_image, fit_image, read_image
from vlm_jax.data.tokens import Tokens

CACHE_BYTES = 256 << 20  # of fitted pictures, kept by each process that makes rows

Arrays = dict[str, np.ndarray]  # the fields of Batch


def empty_rows(config: DataConfig, rows: int) -> Arrays:
    """The fields of a Batch of `rows` rows with nothing in them."""
    size, image_shape = config.image_size, (rows, config.images, config.frames)
    names = ("tokens", "positions", "segments", "media_last", "media_first", "targets")
    arrays = {name: np.zeros((rows, config.tokens), np.int32) for name in names}
    if config.visual_tokens:
        arrays["visual"] = np.zeros((rows, config.tokens), np.int32)
    return arrays | {
        "images": np.zeros((*image_shape, size, size, 3), np.uint8),
        "frames": np.zeros(image_shape[:2], np.int32),
        "weights": np.zeros((rows, config.tokens), np.float32),
    }


def to_batch(arrays: Arrays) -> Batch:
    return Batch(**arrays)


class RowMaker:
    """Makes rows of a source. It pickles: worker processes get a copy, without what is cached."""

    def __init__(self, config: DataConfig, tokens: Tokens, source: Source, seed: int | None):
        """Makes nothing yet.

        Args:
          seed: of the augmentation; None: no augmentation.
        """
        self._config, self._tokens, self._source = config, tokens, source
        self._seed = None if config.blank_images else seed
        self._init()

    def _init(self) -> None:
        self._lock = threading.Lock()
        self._cache: dict[int, list[np.ndarray]] = {}  # of an example, its fitted frames
        self._room = CACHE_BYTES
        self._grey = blank_image(self._config.image_size)

    def __getstate__(self) -> Any:
        return self._config, self._tokens, self._source, self._seed

    def __setstate__(self, state: Any) -> None:
        self._config, self._tokens, self._source, self._seed = state
        self._init()

    def fill(self, arrays: Arrays, place: int, units: list[np.ndarray], number: int) -> None:
        """Fills row `place` of `arrays` with the units of the row whose global number is `number`.

        Raises:
          DataError: a picture cannot be read; it names the example.
        """
        row = {name: array[place] for name, array in arrays.items()}
        rng = None if self._seed is None else np.random.default_rng((self._seed, number))
        slots, before = 0, []  # slots in use, and before each unit
        for sequences in units:
            before.append(slots)
            example = int(self._tokens.example[sequences[0]])
            for frames in self._pictures(example) if self._tokens.images[example] else ():
                row["frames"][slots] = len(frames)
                row["images"][slots, : len(frames)] = frames if rng is None else self._augment(frames, rng)
                slots += 1
        self._tokens.write(np.concatenate(units), np.repeat(before, [len(unit) for unit in units]), row)

    def _augment(self, frames: list[np.ndarray], rng: np.random.Generator) -> list[np.ndarray]:
        if len(frames) == 1:
            return [augment(frames[0], self._config.augment, rng)]
        stacked = np.concatenate(frames, axis=-1)  # a video's frames are changed alike
        return np.split(augment(stacked, self._config.augment, rng), len(frames), axis=-1)

    def _pictures(self, example: int) -> list[list[np.ndarray]]:
        """The fitted frames of an example's slots."""
        kept = self._cache.get(example)
        if kept is not None:
            return kept
        found = self._source[example]
        made = [[self._picture(frame, found) for frame in slot] for slot in found.images]
        size = sum(frame.nbytes for slot in made for frame in slot)
        with self._lock:
            # An epoch asks for every example once: what is kept first serves as well as what is kept last.
            if size <= self._room:
                self._room -= size
                self._cache[example] = made
        return made

    def _picture(self, frame: Frame, example: Example) -> np.ndarray:
        if self._config.blank_images:
            return self._grey
        try:
            return fit_image(read_image(frame), self._config.image_size, self._config.image_fit)
        except ImageError as error:
            raise DataError(f"{example.id}: {error}") from error
