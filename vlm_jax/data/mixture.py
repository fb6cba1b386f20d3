"""The token stores of a mixture as one, and what an epoch takes of each.

Every member's examples are an endless sequence of its own, shuffled anew each time all were seen. Epoch e of the mixture takes
of member i the places e*n_i to (e + 1)*n_i, n_i as its weight says. So nothing is kept of what was drawn before: an epoch, and
with it every row, is known from its number.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from vlm_jax.data.packing import hash_uint64, included
from vlm_jax.data.store import Lengths, TokenStore

ORDER = 4  # a number of its own among those that are hashed


class MixedStore:
    """Several token stores, their conversations and examples numbered on; read like a `TokenStore`. It pickles as them."""

    def __init__(
        self, stores: tuple[TokenStore, ...], weights: tuple[float, ...], *, shares: bool, phases: tuple[int, ...] = ()
    ) -> None:
        """
        Args:
          weights: of each store, as `shares` says: its share of the examples, relative to the others, or how often it is seen
            in an epoch.
          phases: of each store: what those of lower ones give comes first in an epoch; (): there is one phase.
        """
        self._stores, self._weights, self._shares, self._phases = stores, weights, shares, phases
        contents = [store.meta["content"] for store in stores]
        self.meta = {"content": contents[0] if len(contents) == 1 else zlib.crc32(repr(contents).encode())}
        names = repr(([store.folder.name for store in stores], weights, shares, *([phases] if phases else [])))
        self.folder: Path = stores[0].folder.with_name(f"mixture-{hashlib.sha256(names.encode()).hexdigest()[:24]}")
        self._conversations = np.cumsum([0, *map(len, stores)])
        self._examples = np.cumsum([0, *(len(store.slots) for store in stores)])

    def __reduce__(self) -> Any:
        return functools.partial(type(self), shares=self._shares, phases=self._phases), (self._stores, self._weights)

    def __len__(self) -> int:
        return int(self._conversations[-1])

    def _joined(self, field: str) -> np.ndarray:
        return np.concatenate([getattr(store, field) for store in self._stores])

    slots = functools.cached_property(lambda self: self._joined("slots"))
    shared = functools.cached_property(lambda self: self._joined("shared"))
    first_medium = functools.cached_property(lambda self: self._joined("first_medium"))
    example_media = functools.cached_property(lambda self: self._joined("example_media"))

    @functools.cached_property
    def example(self) -> np.ndarray:
        """[conversations] int32."""
        return np.concatenate([store.example + start for store, start in zip(self._stores, self._examples, strict=False)])

    @functools.cached_property
    def media_offsets(self) -> np.ndarray:
        """[examples + 1] int64."""
        return np.concatenate([[0], np.cumsum(self.example_media, dtype=np.int64)])

    def _at(self, starts: np.ndarray, number: int) -> tuple[TokenStore, int]:
        member = int(np.searchsorted(starts, number, side="right")) - 1
        return self._stores[member], int(number) - int(starts[member])

    def written(self, index: int) -> Any:
        store, own = self._at(self._conversations, index)
        return store.written(own)

    def sizes_of(self, index: int) -> Any:
        store, own = self._at(self._conversations, index)
        return store.sizes_of(own)

    def media_of(self, example: int) -> Any:
        store, own = self._at(self._examples, example)
        return store.media_of(own)

    def folder_of(self, example: int) -> Path:
        return self._at(self._examples, example)[0].folder

    def file_bytes_of(self, example: int) -> list[int]:
        store, own = self._at(self._examples, example)
        return store.file_bytes_of(own)

    @functools.cached_property
    def lengths_to_pack(self) -> Lengths:
        # Examples that were left out when they were tokenised have no conversation.
        examples = [len(np.unique(store.example)) for store in self._stores]
        passes = self._weights
        if self._shares:
            whole = sum(examples) / sum(self._weights)
            passes = tuple(weight * whole / count for weight, count in zip(self._weights, examples, strict=True))
        members = [
            _Member(store.example, store.share, often, first)
            for store, often, first in zip(self._stores, passes, self._conversations, strict=False)
        ]
        drawn = functools.partial(draw, members)
        phase = np.repeat(self._phases, list(map(len, self._stores))).astype(np.int32) if self._phases else None
        return Lengths(self._joined("lengths"), self.example, self.slots, shared=self.shared, drawn=drawn, phase=phase)


@dataclasses.dataclass(frozen=True)
class _Member:
    example: np.ndarray  # [conversations] int32 of its own store, ascending
    share: np.ndarray  # [conversations] float32, as `Lengths.share`
    passes: float  # how often it is seen in an epoch of the mixture
    first: int  # number of its first conversation in the mixture


def draw(members: list[_Member], seed: int, epoch: int) -> tuple[np.ndarray, np.ndarray]:
    """The sequences of an epoch of the mixture, and for each the number of the draw that took its example.

    Both are [sequences] int64. An example that is drawn twice has its sequences twice, under two numbers.
    """
    indices, draws, count = [], [], 0
    for number, member in enumerate(members):
        for of_pass, taken in _places(member, number, seed, epoch):
            index, place = taken
            kept = included(member.share, seed, of_pass, index)
            indices.append(index[kept] + member.first)
            draws.append(place[kept] + count)
            count += int(place[-1]) + 1 if len(place) else 0
    empty = [np.zeros(0, np.int64)]
    return np.concatenate(indices or empty), np.concatenate(draws or empty)


def _places(member: _Member, number: int, seed: int, epoch: int) -> list[tuple[int, tuple[np.ndarray, np.ndarray]]]:
    """Of each pass through a member that an epoch takes something of: which, the conversations, and their examples' places."""
    begins = np.flatnonzero(np.append(True, member.example[1:] != member.example[:-1])) if len(member.example) else []
    examples = len(begins)
    if not examples:
        return []
    counts = np.diff(np.append(begins, len(member.example)))
    start, stop = (int(np.floor(at * member.passes * examples)) for at in (epoch, epoch + 1))
    found = []
    for of_pass in range(start // examples, -(-stop // examples)):
        low, high = max(start - of_pass * examples, 0), min(stop - of_pass * examples, examples)
        order = np.argsort(hash_uint64(seed, of_pass, ORDER, number, np.arange(examples)), kind="stable")[low:high]
        sizes = counts[order]
        ends = np.cumsum(sizes)
        index = np.repeat(begins[order] - (ends - sizes), sizes) + np.arange(int(ends[-1]) if len(ends) else 0)
        found.append((of_pass, (index, np.repeat(np.arange(len(order)), sizes))))
    return found
