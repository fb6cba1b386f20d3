"""Packing: a plan of an epoch says which sequences are in which row, before any image is opened.

A *unit* is one example's pictures with all, or at most `per_image`, of its sequences; it is what goes into a row as a
whole; tokens that its sequences share count once, and a pair of answers is one sequence, so that both are in the same row.
Units are shuffled, within each phase of a curriculum, and put, first fit, into rows of at most `tokens` tokens and `images`
pictures. Every sequence of every example is in exactly one row of an epoch; one with a share below 1 is included with that
probability.

The plan depends on the lengths, the seed and the epoch only. So any row of a run can be named by one integer and made
without making those before it: a run resumes anywhere, and any number of processes cuts the same rows among them.

Plans are made once and kept beside the data set's tokens, where every process maps them into memory.

The shuffle is by sorting hashes (splitmix64), not by NumPy's generators, whose streams may change between releases.
"""

from __future__ import annotations

import dataclasses
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np

from vlm_jax.data.store import Lengths, TokenStore, locked
from vlm_jax.errors import DataError

VERSION = 1  # of plans: those of another version are not read
OPEN_ROWS = 32  # rows that first fit searches; more fill slightly better and plan slower


@dataclasses.dataclass(frozen=True)
class Plan:
    """An epoch: R rows of units of sequences, as flat arrays."""

    rows: np.ndarray  # [rows + 1] row r holds units rows[r]:rows[r + 1]
    units: np.ndarray  # [U + 1] unit u holds sequences[units[u]:units[u + 1]]
    sequences: np.ndarray  # [conversations] indices into `Lengths`

    def __len__(self) -> int:
        return len(self.rows) - 1

    def __getitem__(self, row: int) -> list[np.ndarray]:
        """The row's units, each the indices of its sequences, which are of one example."""
        return [self.sequences[self.units[unit] : self.units[unit + 1]] for unit in range(self.rows[row], self.rows[row + 1])]


def hash_uint64(*values: int | np.ndarray) -> np.ndarray:
    """A well-mixed uint64 of integers (broadcast against each other): splitmix64 (Steele et al. 2014), chained."""
    state = np.uint64(0)
    with np.errstate(over="ignore"):
        for value in values:
            state = np.asarray(value).astype(np.uint64) + (state ^ np.uint64(0x9E3779B97F4A7C15)) * np.uint64(
                0xD1342543DE82EF95
            )
            state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            state = state ^ (state >> np.uint64(31))
    return state


def uniform(*values: int | np.ndarray) -> np.ndarray:
    """Float64 from 0 to 1 of integers, as `hash_uint64`."""
    return (hash_uint64(*values) >> np.uint64(11)) * 2.0**-53


def plan_epoch(
    lengths: Lengths, tokens: int, images: int, per_image: int = 0, seed: int = 0, epoch: int = 0, *, shuffle: bool = True
) -> Plan:
    """Plans one epoch.

    Args:
      tokens: T of a row. images: M of a row.
      per_image: at most so many sequences, or pairs, of a unit; 0: as many as the row takes.
      shuffle: False keeps the order of the data set, and all of it (an evaluation).

    Raises:
      ValueError: a sequence or an example that no row can take (`tokenise.py` says so in the user's words).
    """
    together = lengths.together
    if together > 1:
        plan = plan_epoch(_joined(lengths), tokens, images, per_image, seed, epoch, shuffle=shuffle)
        sequences = (together * plan.sequences[:, None] + np.arange(together, dtype=np.int32)).reshape(-1)
        return Plan(plan.rows, together * plan.units, sequences)
    if len(lengths.tokens) and (lengths.tokens.max() > tokens or lengths.images.max(initial=0) > images):
        raise ValueError("a sequence longer than a row, or an example of more images than a row has")
    index = np.arange(len(lengths.tokens))
    drawn = lengths.example
    if shuffle:
        if lengths.drawn is not None:
            index, drawn = lengths.drawn(seed, epoch)
        elif lengths.share is not None:
            index = index[included(lengths.share, seed, epoch, index)]
            drawn = drawn[index]
        # Within an example by hash; the examples themselves stay together.
        order = np.lexsort((hash_uint64(seed, epoch, 1, index), drawn))
        index, drawn = index[order], drawn[order]
    count = len(index)
    shared = np.zeros_like(lengths.tokens) if lengths.shared is None else lengths.shared
    own, shared = (lengths.tokens - shared)[index], shared[index]
    starts = _unit_starts(own, shared, drawn, tokens, per_image)
    bounds = np.append(starts, count)
    order = np.arange(len(starts))
    if shuffle:
        phase = np.zeros_like(order) if lengths.phase is None else lengths.phase[index[starts]]
        order = np.lexsort((hash_uint64(seed, epoch, 2, order), phase))
    weights = np.add.reduceat(own, starts, dtype=np.int64) + shared[starts] if count else np.zeros(0, np.int64)
    pictures = lengths.images[lengths.example[index[starts]]] if count else np.zeros(0, np.int64)
    rows = _first_fit(weights[order].tolist(), pictures[order].tolist(), tokens, images)
    placed = order[np.fromiter((unit for row in rows for unit in row), np.int64, len(starts))]
    sizes = np.diff(bounds)[placed]
    ends = np.cumsum(sizes)
    sequences = index[np.repeat(bounds[placed] - (ends - sizes), sizes) + np.arange(count)]
    row_bounds = np.cumsum([0, *map(len, rows)])
    return Plan(row_bounds, np.concatenate([[0], ends]).astype(np.int64), sequences.astype(np.int32))


def _joined(lengths: Lengths) -> Lengths:
    """Those that stay together as one."""
    every = lengths.together
    tokens = lengths.tokens.reshape(-1, every).sum(1, dtype=np.int64)
    share, shared = (None if of is None else of[::every] for of in (lengths.share, lengths.shared))
    if shared is not None:
        tokens -= (every - 1) * shared
    return Lengths(tokens, lengths.example[::every], lengths.images, share, shared)


def included(share: np.ndarray, seed: int, epoch: int, index: np.ndarray) -> np.ndarray:
    """[conversations] bool, which sequences an epoch takes by their shares."""
    return uniform(seed, epoch, 3, index) < share[index]


def _unit_starts(own: np.ndarray, shared: np.ndarray, example: np.ndarray, capacity: int, per_image: int) -> np.ndarray:
    """Where units begin: at a new example, after `per_image` sequences, and where the next would not fit in a row.

    Args:
      own: tokens of each sequence beside the `shared` ones of its example, which stand once in a unit.
    """
    count = len(own)
    if not count:
        return np.zeros(0, np.int64)
    new = np.append(True, example[1:] != example[:-1])
    if per_image:
        first = np.flatnonzero(new)
        rank = np.arange(count) - np.repeat(first, np.diff(np.append(first, count)))
        new |= rank % per_image == 0
    starts = np.flatnonzero(new)
    totals = np.add.reduceat(own, starts, dtype=np.int64) + shared[starts]
    more = []
    for unit in np.flatnonzero(totals > capacity):  # few, as a rule
        end = starts[unit + 1] if unit + 1 < len(starts) else count
        filled = prefix = int(shared[starts[unit]])
        for place in range(starts[unit], end):
            if filled + own[place] > capacity:
                more.append(place)
                filled = prefix
            filled += int(own[place])
    return np.sort(np.concatenate([starts, np.asarray(more, np.int64)]))


def _first_fit(tokens: list[int], images: list[int], most_tokens: int, most_images: int) -> list[list[int]]:
    """First fit among the last few rows that are open; a row is closed when it is full, or the oldest of too many."""
    rows: list[list[int]] = []
    open_rows: list[list] = []  # [free tokens, free images, units], oldest first
    least = min(tokens, default=0)
    for unit, (length, pictures) in enumerate(zip(tokens, images, strict=True)):
        for place, row in enumerate(open_rows):  # noqa: B007
            if row[0] >= length and row[1] >= pictures:
                break
        else:
            if len(open_rows) == OPEN_ROWS:
                open_rows.pop(0)
            place, row = len(open_rows), [most_tokens, most_images, []]
            open_rows.append(row)
            rows.append(row[2])
        row[0] -= length
        row[1] -= pictures
        row[2].append(unit)
        if row[0] < least:
            open_rows.pop(place)
    return rows


def _cached_plan(folder: Path, make: Callable[[], Plan]) -> Plan:
    """The plan that is kept in a folder, made if it is not there: by one process, for which the others wait."""
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with locked(folder.with_suffix(".lock"), "another process plans the epoch"):
            if not folder.is_dir():
                plan = make()
                with tempfile.TemporaryDirectory(prefix=".planning-", dir=folder.parent) as made:
                    for field in dataclasses.fields(Plan):
                        np.save(Path(made) / f"{field.name}.npy", getattr(plan, field.name))
                    (Path(made)).rename(folder)
                    Path(made).mkdir()  # what the context removes
    return Plan(*(np.load(folder / f"{field.name}.npy", mmap_mode="r") for field in dataclasses.fields(Plan)))


class PackedRows:
    """All rows of all epochs in order, each found by one integer."""

    def __init__(self, store: TokenStore, tokens: int, images: int, per_image: int, seed: int):
        """Args as in `plan_epoch`; the plans are kept beside the store."""
        self.store, self._args = store, (tokens, images, per_image, seed)
        self._init()

    def _init(self) -> None:
        self._lock = threading.Lock()
        self._firsts = [0]  # the first row of each epoch known so far, and of the one after
        self._plans: dict[int, Plan] = {}

    def __getstate__(self):
        return self.store, self._args

    def __setstate__(self, state):
        self.store, self._args = state
        self._init()

    def plan(self, epoch: int) -> Plan:
        """The plan of an epoch; the last few are kept."""
        if epoch not in self._plans:
            while len(self._plans) >= 3:
                self._plans.pop(next(iter(self._plans)))
            name = "-".join(map(str, (VERSION, *self._args, epoch)))
            make = lambda: plan_epoch(self.store.lengths_to_pack, *self._args, epoch)
            self._plans[epoch] = _cached_plan(self.store.folder / "plans" / name, make)
        return self._plans[epoch]

    def locate(self, row: int) -> tuple[int, int]:
        """Global row -> (epoch, row within it). Epochs differ in their number of rows, so those before are planned."""
        with self._lock:
            while self._firsts[-1] <= row:
                planned = len(self.plan(len(self._firsts) - 1))
                if not planned:
                    raise DataError("data.sampling leaves an epoch without any conversation: raise its shares")
                self._firsts.append(self._firsts[-1] + planned)
            epoch = int(np.searchsorted(self._firsts, row, side="right")) - 1
            return epoch, row - self._firsts[epoch]

    def __getitem__(self, row: int) -> list[np.ndarray]:
        """The units of a global row, as in `Plan`."""
        epoch, within = self.locate(row)
        with self._lock:
            plan = self.plan(epoch)
        return plan[within]
