"""What a conversion table is made of: rows of published name <-> our path <-> how the axes lie.

Axis letters: N query heads, K key/value heads, H head width, D width, F hidden width, V vocabulary, T positions, R latents,
Y x X pixels of a patch, C colours.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping

Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Row:
    """Some published tensors that are some of our parameters.

    Most often it is one and one. The several of either side lie one after the other along the first published axis: a fused
    `Wqkv` is our query, key and value, and IDEFICS's two embeddings are our one.
    """

    published: tuple[str, ...]  # `{}` is the number of the layer, `[...]` an optional part that is not written
    ours: tuple[str, ...]  # paths; with `{}` in the published name their first axis is the layers
    axes: str  # published -> ours: "(N H) D -> D N H"; `()` is an axis of size 1
    sizes: Mapping[str, int]  # of the letters that our shape does not tell
    split: Shape  # first-axis sizes of the published tensors where there are several


def row(published: str | tuple[str, ...], ours: str | tuple[str, ...], axes: str, split: Shape = (), **sizes: int) -> Row:
    several = lambda names: (names,) if isinstance(names, str) else names
    return Row(several(published), several(ours), axes, sizes, split)


@dataclasses.dataclass(frozen=True)
class Copy:
    """A published tensor that repeats another one, as a tied head does. It may be there, must be equal, and is not written."""

    name: str
    of: str


@dataclasses.dataclass(frozen=True)
class Table:
    rows: tuple[Row, ...]
    copies: tuple[Copy, ...] = ()
    ignored: tuple[str, ...] = ()  # published names that are no parameters of ours: buffers, parts we do not have

    def under(self, published: str = "", ours: str = "") -> Table:
        """The table of the same part inside a larger model."""
        rows = tuple(
            dataclasses.replace(
                r, published=tuple(published + name for name in r.published), ours=tuple(ours + path for path in r.ours)
            )
            for r in self.rows
        )
        copies = tuple(Copy(published + copy.name, published + copy.of) for copy in self.copies)
        return Table(rows, copies, tuple(published + name for name in self.ignored))

    def __add__(self, other: Table) -> Table:
        return Table(self.rows + other.rows, self.copies + other.copies, self.ignored + other.ignored)


def pattern(name: str) -> re.Pattern[str]:
    """A published name of a row as a regex, with a group for the layer."""
    escaped = re.escape(name).replace(r"\{\}", r"(\d+)")
    return re.compile(re.sub(r"\\\[(.*?)\\\]", r"(?:\1)?", escaped))


def written(name: str, layer: int | None) -> str:
    """A published name of a row as it is written for `layer`."""
    name = re.sub(r"\[.*?\]", "", name)
    return name if layer is None else name.format(layer)


@dataclasses.dataclass(frozen=True)
class Axes:
    """One row's `axes` with the size of every letter."""

    published: list[list[str]]
    ours: list[list[str]]
    sizes: dict[str, int]

    @property
    def shape(self) -> Shape:
        """Of the published tensor."""
        return tuple(math.prod(self.sizes[letter] for letter in group) for group in self.published)

    def to_ours(self, x):
        return self._move(x, self.published, self.ours)

    def to_published(self, x):
        return self._move(x, self.ours, self.published)

    def _move(self, x, source: list[list[str]], target: list[list[str]]):
        before, after = ([letter for group in side for letter in group] for side in (source, target))
        x = x.reshape([self.sizes[letter] for letter in before]).transpose([before.index(letter) for letter in after])
        return x.reshape([math.prod(self.sizes[letter] for letter in group) for group in target])


def axes_of(axes: str, ours_shape: Shape, sizes: Mapping[str, int]) -> Axes:
    """
    Raises:
      ValueError: our shape is not what `axes` and `sizes` say.
    """
    published, ours = (_groups(side) for side in axes.split("->"))
    sizes = dict(sizes)
    if len(ours) == len(ours_shape):
        for group, size in zip(ours, ours_shape, strict=True):
            if len(group) == 1:
                sizes.setdefault(group[0], size)
        if tuple(math.prod(sizes[letter] for letter in group) for group in ours) == ours_shape:
            return Axes(published, ours, sizes)
    raise ValueError(f"our shape {ours_shape} is not {axes.split('->')[1].strip()} with {sizes}")


def _groups(side: str) -> list[list[str]]:
    """ "(N H) D" -> [["N", "H"], ["D"]]."""
    return [list(group.strip("()").replace(" ", "")) for group in re.findall(r"\(.*?\)|[A-Z]", side)]
