"""Matches a table with published names and model parameters, and collects every mismatch."""

from __future__ import annotations

import dataclasses
import itertools
from collections import defaultdict
from collections.abc import Iterator, Mapping

import jax.numpy as jnp
import numpy as np

from vlm_jax.interop.files.source import Source, Tensor
from vlm_jax.interop.table import Axes, Index, Row, Shape, Table, axes_of, pattern, published_name

CHUNK = 64 << 20  # bytes of two copies that are compared at a time
MAX_LISTED = 30  # mismatches of a kind that a message names; it counts the others


class ConversionError(ValueError):
    """Names, shapes, types or values that do not fit; the message has every kind of mismatch."""


class Problems:
    """Mismatches by kind, reported together in one error."""

    def __init__(self) -> None:
        self.found: dict[str, list[str]] = defaultdict(list)

    def add(self, kind: str, what: str) -> None:
        self.found[kind].append(what)

    def check(self) -> None:
        if self.found:
            lines = []
            for kind, found in self.found.items():
                lines += [f"  {kind} ({len(found)}):", *(f"    {what}" for what in found[:MAX_LISTED])]
                lines += [f"    and {len(found) - MAX_LISTED} more"] if len(found) > MAX_LISTED else []
            raise ConversionError("\n".join(["the weights do not fit the model:", *lines]))


UNMATCHED = "published names that no row of the table knows; add a row, or an `ignored` one"
DOUBLE = "published names that are matched more than once; leave one out"
MISSING = "published names that the model needs and the weights do not have"
UNUSED = "published layers that the model does not have; check the number of layers in its config"
SHAPE = "wrong shapes; check the widths in the model's config"
TYPE = "types that weights do not have; the file is damaged, or quantised: take the original one"
DIFFERENT = "published copies that are not equal to their original; set tied_head=False in the model's config"
NO_PARAMETER = "rows whose parameter the model does not have; use the table of this model's config"
NO_ROW = "parameters that no row of the table makes; use the table of this model's config"


@dataclasses.dataclass(frozen=True)
class Resolved:
    """A row with the sizes of its axes.

    Attributes:
      counts: lengths of the axes that the published name counts: layers, or layers and experts.
    """

    row: Row
    axes: Axes
    counts: Shape

    def places(self) -> Iterator[Shape]:
        """Every layer (and expert): (), (0,), (0, 0), ..."""
        return itertools.product(*(range(count) for count in self.counts))

    def shape_of(self, part: int) -> Shape:
        """Shape of one published tensor."""
        whole = self.axes.shape
        return (self.row.split[part], *whole[1:]) if self.row.split else whole


@dataclasses.dataclass(frozen=True)
class Parameter:
    """One of our parameters, and the published tensors it is read from."""

    resolved: Resolved
    place: int  # which of the row's parameters
    shape: Shape
    names: Mapping[Shape, tuple[str, ...]]  # of every layer, its published tensors one after the other

    def read(self, source: Source, index: Index, dtype: np.dtype | None = None) -> np.ndarray:
        """A part of it; only what the part is made of is read.

        Args:
          dtype: to cast to; None: the type it comes in.

        Raises:
          ConversionError: a value that is not finite.
        """
        counted = len(self.resolved.counts)
        lead, rest = index[:counted], index[counted:]
        first = next(iter(self.names.values()))[0]
        out = np.empty([part.stop - part.start for part in index], dtype or source.tensors[first].dtype)
        for numbers in itertools.product(*(range(part.start, part.stop) for part in lead)):
            piece = self.resolved.axes.take(lambda i, n=numbers: self._read(source, n, i), rest, self.place)
            out[tuple(n - part.start for n, part in zip(numbers, lead, strict=True))] = piece
        return out

    def _read(self, source: Source, numbers: Shape, index: Index) -> np.ndarray:
        """A part of the published tensors of a layer, taken as one."""
        names, row = self.names[numbers], self.resolved.row
        if len(names) == 1:
            return _finite(names[0], source.read(names[0], index))
        parts, begin = [], 0
        for name, size in zip(names, row.split, strict=True):
            low, high = max(index[0].start, begin), min(index[0].stop, begin + size)
            if low < high:
                inside = (slice(low - begin, high - begin), *index[1:])
                parts.append(_finite(name, source.read(name, inside)))
            begin += size
        return parts[0] if len(parts) == 1 else np.concatenate(parts)


def _finite(name: str, values: np.ndarray) -> np.ndarray:
    if not np.isfinite(values).all():
        raise ConversionError(f"{name} holds {np.sum(~np.isfinite(values))} values that are not finite: the file is damaged")
    return values


def resolve(table: Table, shapes: Mapping[str, Shape], problems: Problems) -> list[Resolved]:
    """The rows of a table for our parameters of these shapes."""
    resolved = []
    made: dict[str, int] = defaultdict(int)
    for row in table.rows:
        for path in row.ours:
            made[path] += 1
            if path not in shapes:
                problems.add(NO_PARAMETER, path)
        known = {shapes[path] for path in row.ours if path in shapes}
        if any(path not in shapes for path in row.ours):
            continue
        name = ", ".join(row.ours)
        if len(known) > 1:
            problems.add(SHAPE, f"{name}: one published tensor, and our shapes are {sorted(known)}")
            continue
        shape = known.pop()
        try:
            axes = axes_of(row, shape[row.counted :])
        except ValueError as error:
            problems.add(SHAPE, f"{name}: {error}")
            continue
        if row.split and sum(row.split) != axes.shape[0]:
            problems.add(SHAPE, f"{name}: {axes.shape[0]} rows, and the table splits them into {row.split}")
            continue
        resolved.append(Resolved(row, axes, shape[: row.counted]))
    for path in shapes:
        if not made[path]:
            problems.add(NO_ROW, path)
        elif made[path] > 1:
            problems.add(DOUBLE, f"our {path}, by {made[path]} rows")
    return resolved


def plan(table: Table, source: Source, shapes: Mapping[str, Shape]) -> dict[str, Parameter]:
    """How our parameters are read from published tensors.

    Args:
      shapes: of our parameters, by path.

    Raises:
      ConversionError: a name or a shape does not fit; it lists all of them.
    """
    problems, tensors = Problems(), source.tensors
    rows = resolve(table, shapes, problems)
    found = _match(table, tensors, problems)
    parameters: dict[str, Parameter] = {}
    for one in rows:
        by_place = found.pop(one.row.published, {})
        for (_, numbers), name in by_place.items():
            if any(n >= count for n, count in zip(numbers, one.counts, strict=True)):
                problems.add(UNUSED, f"{name}: the model has {' x '.join(map(str, one.counts))} layers")
        names: dict[Shape, tuple[str, ...]] = {}
        for numbers in one.places():
            for part, template in enumerate(one.row.published):
                name = by_place.get((part, numbers))
                if name is None:
                    problems.add(MISSING, f"{published_name(template, numbers)} (for {', '.join(one.row.ours)})")
                elif tensors[name].shape != one.shape_of(part):
                    problems.add(SHAPE, f"{name}: found {tensors[name].shape}, expected {one.shape_of(part)}")
                elif not jnp.issubdtype(tensors[name].dtype, jnp.floating):
                    problems.add(TYPE, f"{name}: found {tensors[name].dtype}, expected floating-point numbers")
                else:
                    names[numbers] = (*names.get(numbers, ()), name)
        for place, path in enumerate(one.row.ours):
            parameters[path] = Parameter(one, place, shapes[path], names)
    _check_copies(table, source, problems)
    problems.check()
    return parameters


Found = dict[tuple[str, ...], dict[tuple[int, Shape], str]]  # row -> (which of its tensors, layer) -> name


def _match(table: Table, tensors: Mapping[str, Tensor], problems: Problems) -> Found:
    rows = [(pattern(name), row, part) for row in table.rows for part, name in enumerate(row.published)]
    empty = [(pattern(one.name), one.shape) for one in table.empty]
    left_out = [pattern(name) for name in (*table.ignored, *(copy.name for copy in table.copies))]
    left_out += [regex for regex, _ in empty]
    found: Found = defaultdict(dict)
    for name in sorted(tensors):
        hits = [(match, row, part) for regex, row, part in rows if (match := regex.fullmatch(name))]
        skipped = sum(regex.fullmatch(name) is not None for regex in left_out)
        if len(hits) + skipped != 1:
            problems.add(DOUBLE if hits or skipped else UNMATCHED, f"{name} {tensors[name].shape}")
        elif hits:
            match, row, part = hits[0]
            key = (part, tuple(map(int, match.groups())))
            if key in found[row.published]:
                problems.add(DOUBLE, f"{found[row.published][key]} and {name}")
            found[row.published][key] = name
        for regex, shape in empty:
            if regex.fullmatch(name) and tensors[name].shape != shape:
                problems.add(SHAPE, f"{name}: found {tensors[name].shape}, expected {shape}")
    return found


def _check_copies(table: Table, source: Source, problems: Problems) -> None:
    named = lambda template: [name for name in source.tensors if pattern(template).fullmatch(name)]
    for copy in table.copies:
        for name, of in itertools.product(named(copy.name), named(copy.of)):
            if not _equal(source, name, of):
                problems.add(DIFFERENT, f"{name} and {of}")


def _equal(source: Source, name: str, of: str) -> bool:
    first, second = source.tensors[name], source.tensors[of]
    if first.shape != second.shape:
        return False
    rows = max(1, CHUNK // max(1, int(np.prod(first.shape[1:])) * first.dtype.itemsize))
    rest = tuple(slice(0, size) for size in first.shape[1:])
    parts = [(slice(start, min(start + rows, first.shape[0])), *rest) for start in range(0, first.shape[0], rows)]
    return all(np.array_equal(source.read(name, part), source.read(of, part)) for part in parts)
