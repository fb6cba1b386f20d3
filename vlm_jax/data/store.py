"""The token store: a data set tokenised once, kept on disk, and mapped into memory by every process that reads it.

CACHE/KEY/            KEY is made of the fingerprints of the source and the processor, and of what a row can take
  tokens.bin ...      flat arrays, `FIELDS`
  meta.json           counts, what was left out and why, what it was made of; written last
  plans/              which sequence stands in which row, an epoch each (`packing.py`)
CACHE/KEY.part/       a store in the making; an interrupted build is resumed
CACHE/KEY.lock        held by the process that makes it
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from vlm_jax.files import lock
from vlm_jax.processing.layout import TokenizedConversation
from vlm_jax.processing.pictures import Size

log = logging.getLogger(__name__)

BLOCK = 1 << 22  # bytes that are read at once
REPORT_S = 10.0  # seconds between progress lines

# Type of each array as it is written while the store is made; "ids" is uint16 or int32, as the vocabulary needs.
FIELDS = {
    "tokens": "ids",  # [U]
    "flags": "uint8",  # [U]
    "counts": "int32",  # [conversations] compact tokens of a conversation
    "lengths": "int32",  # [conversations] places it takes in a row, its visual tokens among them
    "shared": "int32",  # [conversations] of them, the first ones that all conversations of its example share
    "example": "int32",  # [conversations]
    "first_medium": "int32",  # [conversations] of its example's media
    "media": "int32",  # [conversations] how many of them it has
    "share": "float32",  # [conversations] the chance to be in an epoch
    "slots": "int32",  # [examples] image slots of the example
    "example_media": "int32",  # [examples] its media
    "sizes": "int32",  # [media, 2] height and width of a medium
    "file_bytes": "int64",  # [media] of its file, or of all its frames'
}


# Where each conversation and example begins, and the counts that say so.
OFFSETS = {"offsets": "counts", "media_offsets": "example_media"}


def dtype_of(field: str, ids: str) -> np.dtype:
    return np.dtype(ids if FIELDS[field] == "ids" else FIELDS[field])


@dataclasses.dataclass(frozen=True)
class Lengths:
    """The input of packing: the lengths of N sequences, in the order of their E examples."""

    tokens: np.ndarray  # [conversations] int32, of a sequence
    example: np.ndarray  # [conversations] int32, the example it belongs to, ascending
    images: np.ndarray  # [examples] int32, image slots of an example
    share: np.ndarray | None = None  # [conversations] float32, the chance to be in an epoch; None: all are
    shared: np.ndarray | None = None  # [conversations] int32, tokens that stand once in a unit, equal in an example; None: 0
    together: int = 1  # so many sequences in a row stay together, of which the first says the share: 2 for pairs of answers
    # Of a mixture: seed, epoch -> the sequences of an epoch, and of each the number of the draw that took its example.
    drawn: Callable[[int, int], tuple[np.ndarray, np.ndarray]] | None = None
    phase: np.ndarray | None = None  # [conversations] int32, those of lower phases come first in an epoch; None: one phase


class TokenStore:
    """A finished store. It pickles as its folder: every process maps the same pages.

    Attributes:
      meta: counts, what was left out and why.
      tokens, flags, ... : `FIELDS`; where each begins: offsets [conversations + 1], media_offsets [examples + 1].
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.meta = json.loads((folder / "meta.json").read_text())
        for field in FIELDS:
            setattr(self, field, _mapped(folder / f"{field}.bin", dtype_of(field, self.meta["ids"])))
        self.sizes = self.sizes.reshape(-1, 2)
        self.offsets, self.media_offsets = (np.load(folder / f"{name}.npy", mmap_mode="r") for name in OFFSETS)

    def __reduce__(self) -> Any:
        return type(self), (self.folder,)

    def __len__(self) -> int:
        return len(self.counts)

    @property
    def lengths_to_pack(self) -> Lengths:
        """The input of packing."""
        share = None if np.all(self.share == 1) else self.share
        together = 2 if self.meta.get("pairs") else 1
        return Lengths(self.lengths, self.example, self.slots, share, self.shared, together)

    def written(self, index: int) -> TokenizedConversation:
        """A conversation's compact tokens."""
        here = slice(int(self.offsets[index]), int(self.offsets[index + 1]))
        return TokenizedConversation(np.asarray(self.tokens[here], np.int32), np.asarray(self.flags[here]))

    def media_of(self, example: int) -> list[Size]:
        """The sizes of an example's media."""
        begin, end = self.media_offsets[example], self.media_offsets[example + 1]
        return [(int(height), int(width)) for height, width in self.sizes[begin:end]]

    def folder_of(self, example: int) -> Path:
        """Where its tokens are kept."""
        return self.folder

    def file_bytes_of(self, example: int) -> list[int]:
        """The bytes of the files of an example's media."""
        return self.file_bytes[self.media_offsets[example] : self.media_offsets[example + 1]].tolist()

    def sizes_of(self, index: int) -> list[Size]:
        """The sizes of a conversation's media, in the order of their places."""
        first = int(self.first_medium[index])
        return self.media_of(int(self.example[index]))[first : first + int(self.media[index])]


def content_of(folder: Path) -> int:
    """Checksum of a store's arrays, which takes a second a gigabyte; `meta` has that of what was written."""
    value = 0
    for name in (*(f"{field}.bin" for field in FIELDS), *(f"{name}.npy" for name in OFFSETS)):
        with (folder / name).open("rb") as file:
            while block := file.read(BLOCK):
                value = zlib.crc32(block, value)
    return value


def _mapped(file: Path, dtype: np.dtype) -> np.ndarray:
    # Nothing can be mapped of an empty file.
    return np.memmap(file, dtype, mode="r") if file.stat().st_size else np.zeros(0, dtype)


@contextlib.contextmanager
def locked(path: Path, busy: str) -> Iterator[None]:
    """Waits until no other process of the machine holds the lock; a process that dies lets it go.

    Args:
      busy: what is said while waiting.
    """
    with path.open("a") as file:
        began = reported = time.perf_counter()
        while True:
            try:
                lock(file, busy)
                break
            except BlockingIOError:
                time.sleep(0.1)  # interruptible, unlike waiting for the lock itself
            if time.perf_counter() - reported > REPORT_S:
                reported = time.perf_counter()
                log.info("%s: waiting, %.0f s", busy, reported - began)
        yield
