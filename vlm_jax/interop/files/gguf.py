"""GGUF files as llama.cpp writes them: metadata and tensors, by the `gguf` package. Quantised weights are read as float32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from vlm_jax.interop.files.source import PublishedError, Tensor
from vlm_jax.interop.table import Index


class GgufTensors:
    """A `Source`: of the tensors of a file, the rows that are asked for are read and made float32."""

    def __init__(self, reader: Any) -> None:
        self._found = {tensor.name: tensor for tensor in reader.tensors}
        # GGUF names the fastest axis first.
        self.tensors = {
            name: Tensor(tuple(int(size) for size in reversed(tensor.shape)), np.dtype(np.float32))
            for name, tensor in self._found.items()
        }

    def read(self, name: str, index: Index) -> np.ndarray:
        from gguf import dequantize

        tensor = self._found[name]
        try:
            # Blocks of quantised numbers lie along the last axis: any rows can be taken.
            values = dequantize(tensor.data[index[0]], tensor.tensor_type)
        except NotImplementedError as error:
            raise PublishedError(f"{name}: {error}; quantise the file otherwise") from error
        return values[(slice(None), *index[1:])]


def read_gguf(path: Path) -> tuple[dict[str, Any], GgufTensors]:
    """The metadata of a file, and its tensors.

    Raises:
      PublishedError: no such file, or not one that can be read.
    """
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise PublishedError(f"{path}: the gguf package reads GGUF files: pip install 'vlm_jax[gguf]'") from error
    if not path.is_file():
        raise PublishedError(f"{path}: there is no such file")
    try:
        reader = GGUFReader(path)
    except (ValueError, IndexError, OverflowError) as error:  # each from another kind of damage
        raise PublishedError(f"{path}: no GGUF file, or a damaged one: {error}") from error
    return {name: field.contents() for name, field in reader.fields.items()}, GgufTensors(reader)
