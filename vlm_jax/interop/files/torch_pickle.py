"""Tensors of PyTorch's `.bin` and `.pt` files, read without PyTorch and without executing anything.

Such a file is a zip archive with a pickle that describes tensors, and the bytes of each storage. The unpickler knows the few
names that describe a tensor and refuses every other one, as `torch.load(weights_only=True)` does.
"""

from __future__ import annotations

import dataclasses
import math
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from vlm_jax.interop.files.source import PublishedError, Tensor
from vlm_jax.interop.table import Index, Shape

DTYPES = {
    "DoubleStorage": np.float64,
    "FloatStorage": np.float32,
    "HalfStorage": np.float16,
    "BFloat16Storage": ml_dtypes.bfloat16,
    "LongStorage": np.int64,
    "IntStorage": np.int32,
    "ShortStorage": np.int16,
    "CharStorage": np.int8,
    "ByteStorage": np.uint8,
    "BoolStorage": np.bool_,
}


@dataclasses.dataclass(frozen=True, slots=True)
class _Storage:
    key: str
    dtype: np.dtype
    length: int  # numbers


@dataclasses.dataclass(frozen=True, slots=True)
class _Described:
    storage: _Storage
    offset: int
    shape: Shape
    strides: Shape  # in numbers


def _tensor(storage: _Storage, offset: int, shape: Shape, strides: Shape, *_: Any) -> _Described:
    return _Described(storage, offset, tuple(shape), tuple(strides))


class _Unpickler(pickle.Unpickler):
    KNOWN: dict[tuple[str, str], Any] = {
        ("collections", "OrderedDict"): OrderedDict,
        ("torch._utils", "_rebuild_tensor_v2"): _tensor,
        ("torch._utils", "_rebuild_parameter"): lambda tensor, *_: tensor,
    } | {("torch", name): np.dtype(dtype) for name, dtype in DTYPES.items()}

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self.KNOWN:
            raise PublishedError(
                f"it would run {module}.{name}, which is not a tensor. Use the checkpoint's safetensors files instead"
            )
        return self.KNOWN[module, name]

    def persistent_load(self, identifier: Any) -> _Storage:
        match identifier:
            case ("storage", np.dtype() as dtype, str() as key, str(), int() as length):
                return _Storage(key, dtype, length)
        raise PublishedError(f"unknown storage {identifier!r}")


class TorchPickles:
    """The tensors of some files, nested dicts of them flattened with dots."""

    def __init__(self, files: Iterable[Path]) -> None:
        """
        Raises:
          PublishedError: a file is missing or damaged, or its pickle names anything but tensors.
        """
        self._described: dict[str, tuple[Path, zipfile.ZipFile, _Described]] = {}
        for file in files:
            try:
                archive = zipfile.ZipFile(file)
                folder = archive.namelist()[0].split("/")[0]
                with archive.open(f"{folder}/data.pkl") as stream:
                    content = _Unpickler(stream).load()
            except PublishedError as error:
                raise PublishedError(f"{file}: {error}") from None
            except FileNotFoundError:
                raise PublishedError(f"{file}: there is no such file; fetch the checkpoint again") from None
            except Exception as error:  # a damaged pickle can raise anything
                raise PublishedError(f"{file} is damaged or not a PyTorch zip file ({error}); fetch it again") from error
            for name, described in _flat(content):
                if name in self._described:
                    raise PublishedError(f"{file} and {self._described[name][0]} both hold {name}; leave one out")
                self._described[name] = (file, archive, described)
        self.tensors = {name: Tensor(one.shape, one.storage.dtype) for name, (_, _, one) in self._described.items()}

    def read(self, name: str, index: Index) -> np.ndarray:
        file, archive, one = self._described[name]
        folder, size = archive.namelist()[0].split("/")[0], one.storage.dtype.itemsize
        last = one.offset + sum((n - 1) * stride for n, stride in zip(one.shape, one.strides, strict=True))
        inside = 0 <= one.offset <= last < one.storage.length and min(one.strides, default=0) >= 0
        if math.prod(one.shape) and not inside:
            raise PublishedError(f"{file}: {name} reaches beyond its storage; fetch it again")
        try:
            with archive.open(f"{folder}/data/{one.storage.key}") as stream:
                stream.seek(one.offset * size)
                content = stream.read((last + 1 - one.offset) * size)
        except (KeyError, OSError, zipfile.BadZipFile) as error:
            raise PublishedError(f"{file}: {name} cannot be read ({error}); fetch it again") from error
        strides = [stride * size for stride in one.strides]
        return np.ndarray(one.shape, one.storage.dtype, content, strides=strides)[index]


def _flat(content: Any, prefix: str = "") -> list[tuple[str, _Described]]:
    """Numbers and lists beside the tensors, such as an epoch, are no weights and left out."""
    if isinstance(content, _Described):
        return [(prefix, content)]
    if isinstance(content, dict):
        return [item for key, value in content.items() for item in _flat(value, f"{prefix}.{key}" if prefix else str(key))]
    return []
