"""Fashion-MNIST (Xiao et al. 2017): grey catalogue photographs of 28 x 28 pixels and ten classes, as Debian packages it.

    apt-get install --no-install-recommends dataset-fashion-mnist       # into /usr/share/datasets/fashion-mnist

60,000 are for training and 10,000 for evaluation, in the makers' split and order.
"""

from __future__ import annotations

import gzip
import zlib
from pathlib import Path

import numpy as np

from vlm_jax.config import DataConfig
from vlm_jax.config.data import FashionMnistConfig
from vlm_jax.data.example import SOURCES, Example, Source, Split
from vlm_jax.errors import DataError
from vlm_jax.processing.conversation import Medium, assistant, user

CLASSES = ("T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")
FILES = {"train": "train", "eval": "t10k"}
MAGIC = {"images-idx3": 2051, "labels-idx1": 2049}


class FashionMnistSource(Source):
    """One example a picture, whose answer is the name of its class."""

    def __init__(self, config: FashionMnistConfig, split: Split) -> None:
        """
        Raises:
          DataError: its files are not there, or are damaged.
        """
        folder = Path(config.folder).expanduser()
        self._images = _read(folder, f"{FILES[split]}-images-idx3-ubyte.gz")
        self._labels = _read(folder, f"{FILES[split]}-labels-idx1-ubyte.gz")
        if len(self._images) != len(self._labels) or self._labels.max(initial=0) >= len(CLASSES):
            raise DataError(f"data.source.folder={folder}: its images and labels do not go together: install it again")
        if config.photographed:
            self._images = 255 - self._images
        self._split = split
        content = zlib.crc32(self._labels.tobytes(), zlib.crc32(self._images.tobytes()))
        self.fingerprint = f"fashion_mnist {split} {content}"

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, index: int) -> Example:
        image = np.repeat(self._images[index][:, :, None], 3, axis=2)
        conversation = (user(Medium(0)), assistant(CLASSES[self._labels[index]]))
        return Example(id=f"fashion_mnist {self._split} {index}", media=((image,),), conversations=(conversation,))

    def check(self, conversations: int) -> None:
        """Any number is right."""


def _read(folder: Path, name: str) -> np.ndarray:
    """An idx file: a number that says its kind, a size for each axis, all 32 bits and big-endian, and the bytes."""
    kind = next(kind for kind in MAGIC if kind in name)
    try:
        content = gzip.decompress((folder / name).read_bytes())
    except FileNotFoundError as error:
        raise DataError(
            f"data.source.folder={folder}: {name} is not there: install Debian's dataset-fashion-mnist, or unpack it with "
            "dpkg-deb -x and name its folder"
        ) from error
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{folder / name} is damaged ({error}): install dataset-fashion-mnist again") from error
    axes = int(kind[-1])
    magic, *shape = np.frombuffer(content, ">i4", count=min(1 + axes, len(content) // 4)).tolist() or [0]
    values = np.frombuffer(content, np.uint8, offset=4 * (1 + axes)) if len(shape) == axes else np.zeros(0, np.uint8)
    if magic != MAGIC[kind] or len(values) != np.prod(shape):
        raise DataError(f"{folder / name} is damaged: it is no idx file of {kind}: install dataset-fashion-mnist again")
    return values.reshape(shape)


@SOURCES.add(FashionMnistConfig)
def open_fashion_mnist(config: DataConfig, split: Split) -> FashionMnistSource:
    return FashionMnistSource(config.source, split)
