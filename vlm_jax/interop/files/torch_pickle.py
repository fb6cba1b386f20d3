"""Tensors of PyTorch's `.bin` and `.pt` files, read without PyTorch and without executing anything.

Such a file is a zip archive with a pickle that describes tensors (`tensor_pickle.py`), and the bytes of each storage.
"""

from __future__ import annotations

import math
import zipfile
import zlib
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from vlm_jax.interop.files.source import PublishedError, Tensor
from vlm_jax.interop.files.tensor_pickle import Described, read_pickle, tensors_of
from vlm_jax.interop.table import Index

LARGEST = 1 << 28  # bytes of the description; that of a model of thousands of tensors has one million


class TorchPickles:
    """The tensors of some files, nested dicts of them flattened with dots."""

    def __init__(self, files: Iterable[Path]) -> None:
        """
        Raises:
          PublishedError: a file is missing or damaged, or its pickle names anything but tensors.
        """
        self._described: dict[str, tuple[Path, zipfile.ZipFile, Described]] = {}
        for file in files:
            if file.exists() and not file.is_file():
                raise PublishedError(f"{file} is not a regular file; remove it, or fetch it again")
            try:
                archive = zipfile.ZipFile(file)
                folder = archive.namelist()[0].split("/")[0]
                description = archive.getinfo(f"{folder}/data.pkl")
                if description.file_size > LARGEST:
                    raise PublishedError(f"its description has {description.file_size:,} bytes; at most {LARGEST:,} are read")
                found = list(tensors_of(read_pickle(archive.read(description))))
                sizes = {info.filename: info.file_size for info in archive.infolist()}
            except PublishedError as error:
                raise PublishedError(f"{file}: {error}") from None
            except FileNotFoundError:
                raise PublishedError(f"{file}: there is no such file; fetch the checkpoint again") from None
            except Exception as error:  # zipfile and zlib raise many kinds on damaged files
                raise PublishedError(f"{file} is damaged or not a PyTorch zip file ({error}); fetch it again") from error
            for name, described in found:
                storage = described.storage
                if sizes.get(f"{folder}/data/{storage.key}", 0) < storage.length * storage.dtype.itemsize:
                    raise PublishedError(f"{file} is damaged or cut short: the numbers of {name} are missing; fetch it again")
                if name in self._described:
                    raise PublishedError(f"{file} and {self._described[name][0]} both hold {name}; leave one out")
                self._described[name] = (file, archive, described)
        self.tensors = {name: Tensor(one.shape, one.storage.dtype) for name, (_, _, one) in self._described.items()}

    def read(self, name: str, index: Index) -> np.ndarray:
        file, archive, one = self._described[name]
        folder, size = archive.namelist()[0].split("/")[0], one.storage.dtype.itemsize
        last = one.offset + sum((n - 1) * stride for n, stride in zip(one.shape, one.strides, strict=True))
        inside = last < one.storage.length
        if math.prod(one.shape) and not inside:
            raise PublishedError(f"{file}: {name} reaches beyond its storage; fetch it again")
        try:
            with archive.open(f"{folder}/data/{one.storage.key}") as stream:
                stream.seek(one.offset * size)
                content = stream.read((last + 1 - one.offset) * size)
        except (KeyError, OSError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            raise PublishedError(f"{file}: {name} cannot be read ({error}); fetch it again") from error
        strides = [stride * size for stride in one.strides]
        return np.ndarray(one.shape, one.storage.dtype, content, strides=strides)[index]
