"""Where published tensors are read from."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
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
