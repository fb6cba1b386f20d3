"""Features of a frozen vision encoder, computed once and kept on disk: an epoch then reads them instead of pixels.

CACHE/KEY.features/   KEY is made of the encoder's parameters, the processing of pictures, and the token store
  features.bin        [distinct tiles, P, D]: equal pictures of several examples are encoded once
  places.bin          [tiles] int32, where in features.bin, the tiles of all media one after the other
  tiles.bin           [media] int32, tiles of a medium; -1: its picture cannot be used (bad_lines="skip")
  meta.json           sizes and a checksum; written last
CACHE/KEY.features.part/   in the making; an interrupted build is resumed
  digests.bin         [distinct tiles] of the pixels of each
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import logging
import os
import shutil
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from vlm_jax.data.store import BLOCK, TokenStore, locked
from vlm_jax.errors import DataError
from vlm_jax.files import JsonError, parse_json, read_regular
from vlm_jax.processing.batching import Tiles
from vlm_jax.processing.pictures import ImageError
from vlm_jax.progress import Countdown

log = logging.getLogger(__name__)

VERSION = 2  # of the files
DIGEST = 16  # bytes
SAVE_S = 5.0  # seconds of work that an interruption may cost

FILES = ("features.bin", "places.bin", "tiles.bin")
IN_THE_MAKING = (*FILES, "digests.bin")

Encode = Callable[[np.ndarray], np.ndarray]  # [B, height, width, 3] uint8 -> [B, P, D]


class FeatureStore:
    """Finished features. It pickles as its folder: every process maps the same pages."""

    def __init__(self, folder: Path, store: TokenStore) -> None:
        """
        Args:
          store: the token store whose media they are of.
        """
        self.folder, self._store = folder, store
        meta = json.loads((folder / "meta.json").read_text())
        self.shape = tuple(meta["shape"])  # [P, D]
        self._tiles = np.fromfile(folder / "tiles.bin", np.int32)
        self._offsets = np.concatenate([[0], np.cumsum(np.maximum(self._tiles, 0), dtype=np.int64)])
        self._places = np.fromfile(folder / "places.bin", np.int32)
        path = folder / "features.bin"
        size = (meta["distinct"], *self.shape)
        self._features = np.memmap(path, np.float32, mode="r", shape=size) if size[0] else np.zeros(size, np.float32)

    def __reduce__(self) -> Any:
        return type(self), (self.folder, self._store)

    def of(self, example: int) -> list[Tiles]:
        """The features [P, D] of the tiles of an example's media.

        Raises:
          ImageError: a picture of it cannot be used.
        """
        first, last = self._store.media_offsets[example : example + 2].tolist()
        if np.any(self._tiles[first:last] < 0):
            raise ImageError("a picture could not be used when its features were computed")
        place = self._offsets[first : last + 1].tolist()
        return [[self._features[tile] for tile in self._places[slice(*ends)]] for ends in itertools.pairwise(place)]


def feature_store(
    cache: Path, store: TokenStore, *, key: tuple[Any, ...], tiles_of: Callable[[int], list[Tiles]], encode: Encode, rows: int
) -> FeatureStore:
    """The features of a token store's media, made if they are not there yet.

    Args:
      key: what they depend on beside the store.
      tiles_of: the number of an example -> the tiles of its media [height, width, 3] uint8; it raises ImageError for one that
        is to be left out.
      rows: B of `encode`.

    Raises:
      DataError: a picture cannot be read; the folder cannot be written or is damaged.
    """
    name = hashlib.sha256(repr((VERSION, *key, store.meta["content"])).encode()).hexdigest()[:24]
    folder = cache / f"{name}.features"
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with locked(cache / f"{name}.features.lock", "another process computes the features"):
            made = not (folder / "meta.json").is_file()
            if made:
                _Builder(folder, store, tiles_of, encode, rows).run()
        if not made and not _is_intact(folder):
            raise DataError(f"{folder} is damaged: remove it, and the next start makes it anew")
        return FeatureStore(folder, store)
    except OSError as error:
        raise DataError(f"{error.filename or cache}: {error.strerror or error} (data.cache_dir keeps the features)") from error


def _is_intact(folder: Path) -> bool:
    try:
        return parse_json(read_regular(folder / "meta.json"))["content"] == _content(folder)
    except (JsonError, KeyError, TypeError, FileNotFoundError):
        return False


def _content(folder: Path) -> int:
    value = 0
    for name in FILES:
        with (folder / name).open("rb") as file:
            while block := file.read(BLOCK):
                value = zlib.crc32(block, value)
    return value


class _Builder:
    def __init__(
        self, target: Path, store: TokenStore, tiles_of: Callable[[int], list[Tiles]], encode: Encode, rows: int
    ) -> None:
        self.target, self.store, self.tiles_of, self.encode, self.rows = target, store, tiles_of, encode, rows
        self.folder = target.with_name(f"{target.name}.part")
        self.numbers: dict[bytes, int] = {}  # of distinct tiles, by the digests of their pixels
        self.shape: tuple[int, int] = (0, 0)
        self._clear()

    def _clear(self) -> None:
        """What waits to be written: distinct tiles by their digests; the place of every tile; the tiles of each medium."""
        self.waiting: dict[bytes, np.ndarray] = {}
        self.places: list[int] = []
        self.counts: list[int] = []

    def run(self) -> None:
        total = len(self.store.example_media)
        start = self._resume()
        began = saved = time.perf_counter()
        countdown = Countdown(log.info, "features: {} examples", total, done=start)
        with contextlib.ExitStack() as stack:
            files = [stack.enter_context((self.folder / name).open("ab")) for name in IN_THE_MAKING]
            for example in range(start, total):
                self._add(example)
                now = time.perf_counter()
                if len(self.waiting) >= self.rows or example + 1 == total:
                    self._write(*files)
                # Between batches only: a part of one takes as long to encode as a whole one.
                if not self.waiting and now - saved > SAVE_S:
                    saved = now
                    self._save(example + 1, files)
                countdown.at(example + 1)
        distinct = len(self.numbers)
        meta = {"shape": self.shape, "distinct": distinct, "version": VERSION, "content": _content(self.folder)}
        (self.folder / "meta.json").write_text(json.dumps(meta) + "\n")
        shutil.rmtree(self.target, ignore_errors=True)
        self.folder.rename(self.target)
        for name in ("state.json", "digests.bin"):
            (self.target / name).unlink(missing_ok=True)
        size, took = (self.target / "features.bin").stat().st_size, time.perf_counter() - began
        said = "features of %d examples, %d distinct tiles, %.2f GB, in %.0f s; kept in %s"
        log.info(said, total, distinct, size / 1e9, took, self.target)

    def _add(self, example: int) -> None:
        media = int(self.store.example_media[example])
        try:
            of_example = self.tiles_of(example) if self.store.slots[example] else [[]] * media
        except ImageError:
            self.counts += [-1] * media
            return
        self.counts += [len(tiles) for tiles in of_example] + [0] * (media - len(of_example))
        for tile in (tile for tiles in of_example for tile in tiles):
            digest = hashlib.blake2b(tile.tobytes(), digest_size=DIGEST).digest()
            if digest not in self.numbers:
                self.numbers[digest] = len(self.numbers)
                self.waiting[digest] = tile
            self.places.append(self.numbers[digest])

    def _write(self, features: Any, places: Any, tiles: Any, digests: Any) -> None:
        new = list(self.waiting.values())
        for start in range(0, len(new), self.rows):
            part = np.stack(new[start : start + self.rows])
            short = self.rows - len(part)
            made = self.encode(np.concatenate([part, np.repeat(part[-1:], short, axis=0)]))[: len(part)]
            self.shape = made.shape[1:]
            features.write(np.ascontiguousarray(made, np.float32).tobytes())
        places.write(np.asarray(self.places, np.int32).tobytes())
        tiles.write(np.asarray(self.counts, np.int32).tobytes())
        digests.write(b"".join(self.waiting))
        self._clear()

    def _save(self, example: int, files: list[Any]) -> None:
        self._write(*files)  # places of tiles that were encoded before
        for file in files:
            file.flush()
        state = {"next": example, "shape": self.shape, "bytes": [file.tell() for file in files]}
        part = self.folder / "state.json.part"
        part.write_text(json.dumps(state))
        part.replace(self.folder / "state.json")

    def _resume(self) -> int:
        """The first example whose features are not there."""
        try:
            state = parse_json(read_regular(self.folder / "state.json"))
            for name, size in zip(IN_THE_MAKING, state["bytes"], strict=True):
                os.truncate(self.folder / name, size)
            digests = (self.folder / "digests.bin").read_bytes()
            kept = [digests[start : start + DIGEST] for start in range(0, len(digests), DIGEST)]
            shape, start = tuple(state["shape"]), state["next"]
        except (JsonError, KeyError, TypeError, FileNotFoundError):  # none, or a damaged one
            shutil.rmtree(self.folder, ignore_errors=True)
            self.folder.mkdir(parents=True)
            return 0
        self.numbers, self.shape = {digest: number for number, digest in enumerate(kept)}, shape
        return start
