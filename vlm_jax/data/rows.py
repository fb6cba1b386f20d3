"""A row's units -> arrays: the pictures decoded and cut into tiles, the tokens in their places."""

from __future__ import annotations

import functools
import threading
from typing import Any

import numpy as np

from vlm_jax.config import AugmentConfig, DataConfig
from vlm_jax.data.augment import augment
from vlm_jax.data.example import Source
from vlm_jax.data.features import FeatureStore
from vlm_jax.data.packing import uniform
from vlm_jax.data.store import TokenStore
from vlm_jax.errors import DataError, RequestError
from vlm_jax.processing.batching import Arrays, Tiles, put_media, put_sequence
from vlm_jax.processing.layout import targets_of
from vlm_jax.processing.media import Medium
from vlm_jax.processing.pictures import FileUnavailable, ImageError, Size, file_bytes, picture_name, picture_size
from vlm_jax.processing.processor import Spread

NEXT_IMAGE = 5  # a number of its own among those that are hashed
CACHE_BYTES = 64 << 20  # of tiles, kept by each process that makes rows


def empty_rows(config: DataConfig, rows: int, *, features: tuple[int, int] | None = None) -> Arrays:
    """The fields of a Batch of `rows` rows with nothing in them.

    Args:
      features: P and D of a tile, where the batch holds features in the place of pixels.
    """
    size, image_shape = config.image_size, (rows, config.images, config.frames)
    names = ["tokens", "positions", "segments", "media_last", "media_first", "prefix_end", "targets"]
    names += ["visual"] if config.visual_tokens else []
    names += ["prefix_segments"] if config.share_prefix else []
    names += ["preference"] if config.pairs else []
    arrays = {name: np.zeros((rows, config.tokens), np.int32) for name in names}
    if config.keep_shapes:
        arrays["sizes"] = np.zeros((*image_shape, 2), np.int32)
    seen = {"images": np.zeros((*image_shape, size, size, 3), np.uint8)}
    if features is not None:
        seen = {"features": np.zeros((*image_shape, *features), np.float32)}
    return arrays | {
        **seen,
        "frames": np.zeros(image_shape[:2], np.int32),
        "weights": np.zeros((rows, config.tokens), np.float32),
    }


class RowMaker:
    """Makes rows of a source. It pickles: worker processes get a copy, without what is cached."""

    def __init__(
        self,
        config: DataConfig,
        store: TokenStore,
        source: Source,
        spread: Spread,
        seed: int | None,
        *,
        features: FeatureStore | None = None,
    ) -> None:
        """Makes nothing yet.

        Args:
          spread: of the processor.
          seed: of what is drawn in training, augmentation and the next picture; None: nothing is.
          features: what stands in the rows in the place of pixels; None: pixels do.
        """
        self._config, self._store, self._source, self._spread, self._features = config, store, source, spread, features
        self._skips = config.source.bad_lines == "skip"
        self._seed = None if config.blank_images or config.augment == AugmentConfig() else seed
        self._next_seed = seed if config.next_image else None
        self._init()

    def _init(self) -> None:
        self._lock = threading.Lock()
        self._cache: dict[int, list[Tiles]] = {}  # of an example, the tiles of its media
        self._room = CACHE_BYTES

    def __getstate__(self) -> Any:
        return {name: value for name, value in self.__dict__.items() if name not in ("_lock", "_cache", "_room")}

    def __setstate__(self, state: Any) -> None:
        self.__dict__.update(state)
        self._init()

    def fill(self, arrays: Arrays, place: int, units: list[np.ndarray], number: int) -> list[int]:
        """Fills row `place` of `arrays` with the units of the row whose global number is `number`.

        Returns:
          the examples that are left out because a picture of theirs cannot be used.

        Raises:
          DataError: a picture cannot be read; it names the example.
        """
        row = {name: array[place] for name, array in arrays.items()}
        rng = None if self._seed is None else np.random.default_rng((self._seed, number))
        tile_tokens = self._spread.media.tile_tokens
        slot = begin = segment = pairs = 0
        left_out: list[int] = []
        for conversations in units:
            example = int(self._store.example[conversations[0]])
            try:
                media = self._seen(example) if self._store.slots[example] else []
            except ImageError:
                left_out.append(example)
                continue
            if rng is not None:
                media = [self._augment(tiles, rng) for tiles in media]
            try:
                taken = put_media(row, media, slot=slot, in_sequence=tile_tokens > 0)
            except ValueError as error:
                raise DataError(f"{self._source[example].id}: {error}: data.image_size") from error
            shared = int(self._store.shared[conversations[0]]) if len(conversations) > 1 else 0
            prefix_segment = segment = segment + 1 if shared else segment
            for order, index in enumerate(conversations):
                layout = self._spread(self._store.written(index), self._store.sizes_of(index))
                if self._sees_next(number, int(index)):
                    layout = layout.with_next_image()
                targets, weights = targets_of(layout, self._spread.end_id)
                first = int(self._store.first_medium[index])
                before = slot + (sum(map(len, media[:first])) if tile_tokens else first)
                put = functools.partial(put_sequence, row, slot=before, tile_tokens=tile_tokens)
                layout = layout.without_last()
                if shared and not order:
                    begin = put(layout[:shared], begin, segment=prefix_segment)
                segment += 1
                end = put(layout[shared:], begin, segment=segment, after=shared)
                row["targets"][begin:end], row["weights"][begin:end] = targets[shared:], weights[shared:]
                if shared:
                    row["prefix_segments"][begin:end] = prefix_segment
                if "preference" in row:
                    pairs += order % 2 == 0
                    row["preference"][begin:end] = pairs if order % 2 == 0 else -pairs
                begin = end
            slot += taken
        return left_out

    def why(self, number: int) -> str:
        """Why an example is left out."""
        try:
            self.tiles(number)
        except ImageError as error:
            return f"{self._source[number].id}: {error}"
        return f"{self._source[number].id}: its pictures could not be read, and now can"

    def _sees_next(self, row: int, index: int) -> bool:
        """Whether this time the conversation's tokens see the next picture: another draw in each epoch."""
        if self._next_seed is None:
            return False
        return uniform(self._next_seed, row, NEXT_IMAGE, index) < self._config.next_image

    def _augment(self, tiles: Tiles, rng: np.random.Generator) -> Tiles:
        if len(tiles) == 1:
            return [augment(tiles[0], self._config.augment, rng)]
        stacked = np.concatenate(tiles, axis=-1)  # all frames of a video get the same augmentation
        return np.split(augment(stacked, self._config.augment, rng), len(tiles), axis=-1)

    def _seen(self, number: int) -> list[Tiles]:
        """What stands in the rows for an example's media: tiles of pixels, or their features."""
        if self._features is None:
            return self.tiles(number)
        found, example = self._features.of(number), self._source[number]
        for medium, size in zip(example.media, self._store.file_bytes_of(number), strict=False):
            try:
                same = sum(map(file_bytes, medium)) == size
            except ImageError as error:
                raise DataError(f"{example.id}: {error}") from error
            if not same:
                raise self._changed(number, medium)
        return found

    def _changed(self, number: int, medium: Medium) -> DataError:
        return DataError(
            f"{self._source[number].id}: picture {picture_name(medium[0])} was changed since it was tokenised: "
            f"delete {self._store.folder_of(number)}, which is made anew, and start again"
        )

    def tiles(self, number: int) -> list[Tiles]:
        """The tiles of an example's media.

        Raises:
          DataError: a picture cannot be read; ImageError: one cannot be used, and the example is to be left out.
        """
        kept = self._cache.get(number)
        if kept is not None:
            return kept
        example = self._source[number]
        known = zip(self._store.media_of(number), self._store.file_bytes_of(number), strict=True)
        made = [self._pixels(number, *one) for one in zip(example.media, known, strict=False)]  # others are not referenced
        size = sum(tile.nbytes for tiles in made for tile in tiles)
        with self._lock:
            # An epoch reads every example once, so keeping the first ones is as good as keeping the last ones.
            if size <= self._room:
                self._room -= size
                self._cache[number] = made
        return made

    def _pixels(self, number: int, medium: Medium, known: tuple[Size, int]) -> Tiles:
        """
        Raises:
          DataError: it is not the picture that was tokenised, or cannot be used and data.source.bad_lines is "error".
          ImageError: it cannot be used, and is to be left out.
        """
        try:
            # The bytes first: what was damaged since then is no picture that was broken before.
            if sum(map(file_bytes, medium)) != known[1] or picture_size(medium[0]) != known[0]:
                raise self._changed(number, medium)
            return self._spread.media.pixels(medium)
        except (ImageError, RequestError) as error:
            if isinstance(error, ImageError) and not isinstance(error, FileUnavailable) and self._skips:
                raise
            raise DataError(f"{self._source[number].id}: {error}") from error
