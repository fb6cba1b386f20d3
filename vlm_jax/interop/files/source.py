"""Where published tensors are read from."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Protocol

import numpy as np

from vlm_jax.interop.table import Index, Shape


class PublishedError(ValueError):
    """A published checkpoint that is missing, damaged, or of a kind that cannot be read; the message says which."""


@dataclasses.dataclass(frozen=True, slots=True)
class Tensor:
    shape: Shape
    dtype: np.dtype


class Source(Protocol):
    """Tensors by name, of which any part can be read without the rest."""

    tensors: Mapping[str, Tensor]

    def read(self, name: str, index: Index) -> np.ndarray:
        """
        Args:
          index: a slice with bounds for each axis.

        Raises:
          PublishedError: the tensor cannot be read.
        """
        ...


class Arrays:
    """Tensors that are in memory."""

    def __init__(self, arrays: Mapping[str, np.ndarray]) -> None:
        self._arrays = arrays
        self.tensors = {name: Tensor(array.shape, array.dtype) for name, array in arrays.items()}

    def read(self, name: str, index: Index) -> np.ndarray:
        return self._arrays[name][index]


class Renamed:
    """The tensors of another source under other names; those whose new name is None are left out."""

    def __init__(self, source: Source, new: Callable[[str], str | None]) -> None:
        self._source = source
        self._old = {name: old for old in source.tensors if (name := new(old)) is not None}
        self.tensors = {name: source.tensors[old] for name, old in self._old.items()}

    def read(self, name: str, index: Index) -> np.ndarray:
        return self._source.read(self._old[name], index)


class FirstRows:
    """Another source, of which some tensors have only their first rows."""

    def __init__(self, source: Source, rows: Mapping[str, int]) -> None:
        """
        Args:
          rows: how many, by name.
        """
        self.read = source.read
        self.tensors = dict(source.tensors)
        for name, count in rows.items():
            shape, dtype = source.tensors[name].shape, source.tensors[name].dtype
            self.tensors[name] = Tensor((count, *shape[1:]), dtype)


class Joined:
    """Several sources as one, each with a beginning of its own for its names."""

    def __init__(self, sources: Mapping[str, Source]) -> None:
        self._of = {part + name: (source, name) for part, source in sources.items() for name in source.tensors}
        self.tensors = {name: source.tensors[old] for name, (source, old) in self._of.items()}

    def read(self, name: str, index: Index) -> np.ndarray:
        source, old = self._of[name]
        return source.read(old, index)
