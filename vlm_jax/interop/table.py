"""Conversion tables: rows of published name <-> our path <-> order of the axes.

Letters of tables beside those of `layers/__init__.py`: T also positions, Y x X pixels of a patch, C colours, J which of our
parameters where a published tensor holds several.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Mapping, Sequence

import numpy as np

Shape = tuple[int, ...]
Index = tuple[slice, ...]  # with bounds, no steps


@dataclasses.dataclass(frozen=True)
class Row:
    """Some published tensors that are some of our parameters.

    Most often it is one and one. A published tensor that holds several of ours has an axis J: a fused `Wqkv` of our query, key
    and value is "(J N H) D -> D N H". Several published tensors that are one of ours lie one after the other along their first
    axis, as IDEFICS's two embeddings.
    """

    published: tuple[str, ...]  # `{}` is the number of a layer (or of an expert in it); for `[...]` see `Table`
    ours: tuple[str, ...]  # paths; their first axes are those that the published name counts with `{}`
    axes: str  # published -> ours: "(N H) D -> D N H"; `()` is an axis of size 1
    sizes: Mapping[str, int]  # sizes of letters not determined by our shape
    split: Shape  # first-axis sizes of the published tensors where there are several

    @property
    def counted(self) -> int:
        """Number of our leading axes that the published name counts."""
        return self.published[0].count("{}")


def row(published: str | tuple[str, ...], ours: str | tuple[str, ...], axes: str, split: Shape = (), **sizes: int) -> Row:
    several = lambda names: (names,) if isinstance(names, str) else names
    return Row(several(published), several(ours), axes, sizes, split)


@dataclasses.dataclass(frozen=True)
class Copy:
    """A published tensor that repeats another one, as a tied head does. It may be there, must be equal, and is not written."""

    name: str
    of: str


@dataclasses.dataclass(frozen=True)
class Empty:
    """A published tensor without numbers, so no parameter of ours: DINOv2's 0 registers. It may be there, and is written."""

    name: str
    shape: Shape


@dataclasses.dataclass(frozen=True)
class Table:
    """Rows, and the published names that need none.

    In a published name `[a|b]` stands for any of these spellings, the first of which is written, and `[a]` for a part that may
    be there and is not written.
    """

    rows: tuple[Row, ...]
    copies: tuple[Copy, ...] = ()
    ignored: tuple[str, ...] = ()  # published names that are no parameters of ours: buffers, parts we do not have
    empty: tuple[Empty, ...] = ()

    def under(self, published: str = "", ours: str = "") -> Table:
        """The table of the same part inside a larger model."""
        return self.renamed({"": published}, ours)

    def renamed(self, published: Mapping[str, str], ours: str = "") -> Table:
        """The same with other beginnings of the published names: old -> new, the first old one that fits counts."""

        def new(name: str) -> str:
            old = next(old for old in published if name.startswith(old))
            return published[old] + name[len(old) :]

        rows = (
            dataclasses.replace(r, published=tuple(map(new, r.published)), ours=tuple(ours + path for path in r.ours))
            for r in self.rows
        )
        copies = (Copy(new(copy.name), new(copy.of)) for copy in self.copies)
        empty = (Empty(new(one.name), one.shape) for one in self.empty)
        return Table(tuple(rows), tuple(copies), tuple(map(new, self.ignored)), tuple(empty))

    def __add__(self, other: Table) -> Table:
        parts = ("rows", "copies", "ignored", "empty")
        return Table(*(getattr(self, part) + getattr(other, part) for part in parts))


def pattern(name: str) -> re.Pattern[str]:
    """A published name of a row as a regex, with a group for every number."""

    def regex(part: str) -> str:
        if part == "{}":
            return r"(\d+)"
        return f"(?:{'|'.join(map(re.escape, _alternatives(part)))})" if part.startswith("[") else re.escape(part)

    return re.compile("".join(map(regex, re.split(r"(\[.*?\]|\{\})", name))))


def published_name(name: str, numbers: Shape) -> str:
    """A published name of a row as it is written for a layer (and an expert)."""
    return re.sub(r"\[.*?\]", lambda part: _alternatives(part[0])[0], name).format(*numbers)


def _alternatives(part: str) -> list[str]:
    """ "[a|b]" -> a, b; "[a]" -> nothing, a."""
    texts = part[1:-1].split("|")
    return texts if len(texts) > 1 else ["", *texts]


@dataclasses.dataclass(frozen=True)
class Axes:
    """One row's `axes` with the size of every letter; the groups of letters of each side."""

    published: list[list[str]]
    ours: list[list[str]]
    sizes: dict[str, int]

    @property
    def shape(self) -> Shape:
        """Shape of the published tensor."""
        return tuple(math.prod(self.sizes[letter] for letter in group) for group in self.published)

    def take(self, read: Callable[[Index], np.ndarray], wanted: Index, place: int) -> np.ndarray:
        """The part `wanted` of one of our parameters, reading little more of the published tensor than it is made of.

        Args:
          read: gives a part of the published tensor.
          wanted: of our axes, a slice with bounds for each.
          place: along J, which of our parameters.
        """
        ranges = {letter: (0, size) for letter, size in self.sizes.items()} | {"J": (place, place + 1)}
        for group, part in zip(self.ours, wanted, strict=True):
            if len(group) == 1:
                ranges[group[0]] = (part.start, part.stop)
        index, shape, cut = [], [], []
        for group in self.published:
            stride = math.prod(self.sizes[letter] for letter in group)
            begin, end, whole = 0, stride, False
            for letter in group:
                low, high = ranges[letter]
                stride //= self.sizes[letter]
                if whole:
                    shape.append(self.sizes[letter])
                    cut.append(slice(low, high))
                else:
                    begin, end = begin + low * stride, begin + high * stride
                    shape.append(high - low)
                    cut.append(slice(None))
                    whole = high - low > 1  # what lies within several places of this letter is read whole and cut
            index.append(slice(begin, end))
        x = read(tuple(index)).reshape(shape)[tuple(cut)]
        letters = [letter for group in self.published for letter in group]
        # An axis of ours that is made of several letters was made whole.
        rest = tuple(slice(None) if len(group) == 1 else part for group, part in zip(self.ours, wanted, strict=True))
        return _arranged(x, letters, self.ours)[rest]

    def joined(self, ours: Sequence[np.ndarray]) -> np.ndarray:
        """Our parameters of one row -> the published tensor."""
        letters = [letter for group in self.ours for letter in group]
        parts = [x.reshape([self.sizes[letter] for letter in letters]) for x in ours]
        x, letters = (parts[0], letters) if len(parts) == 1 else (np.stack(parts), ["J", *letters])
        return _arranged(x, letters, self.published)


def _arranged(x: np.ndarray, letters: list[str], groups: list[list[str]]) -> np.ndarray:
    """Axes named by `letters` -> axes that are groups of letters. Letters in no group have size 1 and are dropped."""
    after = [letter for group in groups for letter in group]
    order = [letters.index(letter) for letter in (*(set(letters) - set(after)), *after)]
    size = dict(zip(letters, x.shape, strict=True))
    return x.transpose(order).reshape([math.prod(size[letter] for letter in group) for group in groups])


def axes_of(row: Row, shape: Shape) -> Axes:
    """The axes of a row whose parameters have `shape`, the counted axes left out.

    Raises:
      ValueError: our shape is not what the row says.
    """
    published, ours = (_groups(side) for side in row.axes.split("->"))
    sizes = dict(row.sizes) | ({"J": len(row.ours)} if len(row.ours) > 1 else {})
    if len(ours) == len(shape):
        for group, size in zip(ours, shape, strict=True):
            if len(group) == 1:
                sizes.setdefault(group[0], size)
        if tuple(math.prod(sizes[letter] for letter in group) for group in ours) == shape:
            return Axes(published, ours, sizes)
    raise ValueError(f"our shape {shape} is not {row.axes.split('->')[1].strip()} with {sizes}")


def _groups(side: str) -> list[list[str]]:
    """ "(N H) D" -> [["N", "H"], ["D"]]."""
    return [list(group.strip("()").replace(" ", "")) for group in re.findall(r"\(.*?\)|[A-Z]", side)]
