"""Fashion-MNIST's idx files."""

import gzip
import pickle

import numpy as np
import pytest

from vlm_jax.config import FashionMnistConfig
from vlm_jax.data.sources.fashion_mnist import FashionMnistSource
from vlm_jax.errors import DataError


def idx(magic, values):
    return gzip.compress(np.array([magic, *values.shape], ">i4").tobytes() + values.astype(np.uint8).tobytes())


@pytest.fixture
def folder(tmp_path):
    images = np.arange(3 * 4 * 4).reshape(3, 4, 4)
    (tmp_path / "t10k-images-idx3-ubyte.gz").write_bytes(idx(2051, images))
    (tmp_path / "t10k-labels-idx1-ubyte.gz").write_bytes(idx(2049, np.array([9, 0, 3])))
    return tmp_path


def test_pictures_and_the_names_of_their_classes(folder):
    source = pickle.loads(pickle.dumps(FashionMnistSource(FashionMnistConfig(folder=str(folder)), "eval")))
    assert len(source) == 3 and [source[i].conversations[0][1].text for i in range(3)] == ["ankle boot", "T-shirt", "dress"]
    ((image,),) = source[1].media
    assert (
        image.shape == (4, 4, 3)
        and image.dtype == np.uint8
        and image[:, :, 2].tolist() == np.arange(16, 32).reshape(4, 4).tolist()
    )
    turned = FashionMnistSource(FashionMnistConfig(folder=str(folder), photographed=True), "eval")
    assert (turned[1].media[0][0] == 255 - image).all() and turned.fingerprint != source.fingerprint


def test_files_that_are_missing_or_damaged(folder):
    config = FashionMnistConfig(folder=str(folder))
    with pytest.raises(DataError, match="install Debian's dataset-fashion-mnist"):
        FashionMnistSource(config, "train")
    file = folder / "t10k-labels-idx1-ubyte.gz"
    whole = file.read_bytes()
    for damaged in (
        whole[:-9],
        idx(2051, np.array([9, 0, 3])),
        gzip.compress(gzip.decompress(whole)[:-1]),
        gzip.compress(b"abc"),
    ):
        file.write_bytes(damaged)
        with pytest.raises(DataError, match="is damaged"):
            FashionMnistSource(config, "eval")
    file.write_bytes(idx(2049, np.array([9, 10, 3])))
    with pytest.raises(DataError, match="do not go together"):
        FashionMnistSource(config, "eval")
