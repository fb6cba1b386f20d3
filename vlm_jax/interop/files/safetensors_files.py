"""Tensors of safetensors files: one, or several with an index, as `save_pretrained` writes them."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from vlm_jax.interop.files.settings import read_settings
from vlm_jax.interop.files.source import PublishedError, Tensor
from vlm_jax.interop.table import Index, Shape

NAME, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARD_BYTES = 5 * 10**9  # of an exported file, as transformers'

DTYPES = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U8": np.uint8,
    "BOOL": np.bool_,
}


class SafetensorsFiles:
    """The tensors of some files; only their headers are read until a tensor is asked for."""

    def __init__(self, files: Iterable[Path]) -> None:
        """
        Raises:
          PublishedError: a file is missing or damaged, holds a tensor that another one holds too, or one of a type that
            NumPy does not have.
        """
        self.tensors: dict[str, Tensor] = {}
        self.file: dict[str, Path] = {}
        self._offset: dict[str, int] = {}
        for file in files:
            for name, (dtype, shape, offset) in _header(file).items():
                if name in self.file:
                    raise PublishedError(f"{file} and {self.file[name]} both hold {name}; leave one of the files out")
                if dtype not in DTYPES:
                    raise PublishedError(
                        f"{file}: {name} is of type {dtype}; expected one of {', '.join(DTYPES)}. Quantised checkpoints are "
                        "not read: take the original one"
                    )
                self.tensors[name] = Tensor(shape, np.dtype(DTYPES[dtype]))
                self.file[name], self._offset[name] = file, offset

    def read(self, name: str, index: Index) -> np.ndarray:
        file, tensor = self.file[name], self.tensors[name]
        if not math.prod(tensor.shape):
            return np.zeros(tensor.shape, tensor.dtype)[index]
        try:
            # Mapped for this read alone: what stays mapped is counted as memory of the process.
            return np.asarray(np.memmap(file, tensor.dtype, "r", self._offset[name], tensor.shape)[index])
        except (ValueError, OSError) as error:
            raise PublishedError(f"{file}: {name} cannot be read ({error})") from error


def _header(file: Path) -> dict[str, tuple[str, Shape, int]]:
    """Type, shape and place in the file of every tensor; the library checks that they fit the file.

    Raises:
      PublishedError: there is no such file, or it is damaged.
    """
    if file.exists() and not file.is_file():
        raise PublishedError(f"{file} is not a regular file; remove it, or fetch it again")
    try:
        with safe_open(file, framework="numpy"):
            pass
        with file.open("rb") as stream:
            size = int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(size))
    except FileNotFoundError:
        raise PublishedError(f"{file}: there is no such file; fetch the checkpoint again") from None
    except (SafetensorError, OSError) as error:
        raise PublishedError(f"{file} is damaged or cut short ({error}); fetch it again") from error
    header.pop("__metadata__", None)
    return {name: (one["dtype"], tuple(one["shape"]), 8 + size + one["data_offsets"][0]) for name, one in header.items()}


def files_of_index(index: Path) -> list[Path]:
    """The files that an index names.

    Raises:
      PublishedError: the index is damaged, names a file outside its folder, or one that is not there.
    """
    files = sorted(set(_weight_map(index).values()))
    for name in files:
        if Path(name).name != name or name in (".", ".."):
            raise PublishedError(f"{index} names the file {name!r}: only files in its own folder are read")
        if not (index.parent / name).is_file():
            raise PublishedError(f"{index} names {name}, which is not in {index.parent}; fetch the checkpoint again")
    return [index.parent / name for name in files]


def _weight_map(index: Path) -> dict[str, str]:
    """The file of every tensor."""
    named = read_settings(index).get("weight_map")
    if not isinstance(named, dict) or not all(isinstance(name, str) for name in named.values()):
        raise PublishedError(f"{index} is damaged: its 'weight_map' does not name a file for every tensor; fetch it again")
    return named


def from_index(index: Path) -> SafetensorsFiles:
    """
    Raises:
      PublishedError: as `files_of_index` and `SafetensorsFiles`, or the files do not hold what the index says.
    """
    source = SafetensorsFiles(files_of_index(index))
    said = _weight_map(index)
    held = {name: file.name for name, file in source.file.items()}
    if said != held:
        wrong = sorted(name for name in said.keys() | held.keys() if said.get(name) != held.get(name))
        raise PublishedError(
            f"{index} and its files do not agree on {len(wrong)} tensors, {wrong[0]} among them: the index says "
            f"{said.get(wrong[0], 'nothing')}, and it is in {held.get(wrong[0], 'no file')}; fetch the checkpoint again"
        )
    return source


def write(folder: Path, tensors: Iterable[tuple[str, np.ndarray]], shard_bytes: int = SHARD_BYTES) -> int:
    """Writes tensors as transformers does: one file, or several of at most `shard_bytes` with an index.

    The host holds one file's tensors at a time. Files appear under their name when they are whole.

    Returns:
      the bytes of all tensors.
    """
    parts: list[tuple[Path, list[str]]] = []
    held: dict[str, np.ndarray] = {}
    total = 0

    def flush() -> None:
        part = folder / f"part-{len(parts)}.safetensors.tmp"
        save_file(held, part, metadata={"format": "pt"})
        parts.append((part, list(held)))
        held.clear()

    for name, tensor in tensors:
        if held and sum(one.nbytes for one in held.values()) + tensor.nbytes > shard_bytes:
            flush()
        held[name] = tensor
        total += tensor.nbytes
    flush()
    if len(parts) == 1:
        parts[0][0].rename(folder / NAME)
        return total
    where: dict[str, str] = {}
    for number, (part, names) in enumerate(parts, 1):
        target = f"model-{number:05}-of-{len(parts):05}.safetensors"
        part.rename(folder / target)
        where |= dict.fromkeys(names, target)
    _write_index(folder, where, total)
    return total


def _write_index(folder: Path, where: Mapping[str, str], total: int) -> None:
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")
