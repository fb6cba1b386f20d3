"""PyTorch's pickled weights: only when they are allowed, as PyTorch reads them, nothing executed, every damage told."""

import io
import os
import pickle
import time
import zipfile
from collections import OrderedDict

import numpy as np
import pytest
import torch
from test_files import refused, whole

from vlm_jax.interop.files.folder import open_weights
from vlm_jax.interop.files.torch_pickle import TorchPickles


def test_pickles_only_when_allowed_and_as_torch_reads_them(tmp_path):
    base = torch.randn(6, 5)
    state = {
        "plain": base,
        "transposed": base.t(),
        "part": base[1:3, 2:],
        "half": torch.randn(3).bfloat16(),
        "parameter": torch.nn.Parameter(torch.randn(2, 2)),
        "number": torch.tensor(2),
        "nested": {"deep": torch.ones(2)},
        "epoch": 3,
    }
    torch.save(state, tmp_path / "pytorch_model.bin")
    refused("pytorch_model.bin only, a pickle. Allow it with", open_weights, tmp_path)
    source = open_weights(tmp_path, pickles=True)
    state["nested.deep"] = state.pop("nested")["deep"]
    del state["epoch"]
    assert source.tensors.keys() == state.keys()
    for name, tensor in state.items():
        expected = tensor.detach().float().numpy()
        np.testing.assert_array_equal(source.read(name, whole(tensor.shape)).astype(np.float32), expected)
    np.testing.assert_array_equal(source.read("transposed", (slice(1, 4), slice(0, 2))), base.t()[1:4, :2])


class Evil:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


def test_a_pickle_executes_nothing(tmp_path):
    torch.save({"a": torch.zeros(2), "b": Evil(tmp_path / "was here")}, tmp_path / "x.bin")
    refused(r"x.bin: it would run posix.mkdir, which is not a tensor", TorchPickles, [tmp_path / "x.bin"])
    assert not (tmp_path / "was here").exists()


def test_damaged_pickles(tmp_path):
    file = tmp_path / "x.bin"
    torch.save({"a": torch.randn(100)}, file)
    good = file.read_bytes()
    for content in (b"", b"PK", good[: len(good) // 2], b"\x80\x02}q\x00."):
        file.write_bytes(content)
        refused("x.bin is damaged or not a PyTorch zip file", TorchPickles, [file])


def pickled(file, description, numbers=b""):
    """A file with this description, whose opcodes need not be any that PyTorch writes."""
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("x/data.pkl", description)
        archive.writestr("x/data/0", numbers)


LEVELS = 100_000

PICKLES = {
    "recursive": (b"\x80\x02}q\x00X\x01\x00\x00\x00ah\x00s.", "dicts nested more than 64 deep"),
    "deep": (b"\x80\x02" + b"}X\x01\x00\x00\x00a" * LEVELS + b"N" + b"s" * LEVELS + b".", "dicts nested more than 64 deep"),
    "shared": (b"\x80\x02}q\x00" + b"}X\x01\0\0\0ah\0sX\x01\0\0\0bh\0sq\0" * 60 + b".", "more than 200,000 entries"),
    "deep key": (b"\x80\x02}" + b")" + b"\x85" * LEVELS + b"Ns.", "found tuple, expected str"),
    "deep storage": (b"\x80\x02" + b"]" * LEVELS + b"a" * (LEVELS - 1) + b"Q.", "unknown storage"),
    "name": (b"\x80\x02cposix\nsystem\n.", r"it would run posix.system, which is not a tensor"),
    "stack names": (b"\x80\x02X\x05\x00\x00\x00posixX\x06\x00\x00\x00system\x93.", r"it would run posix.system"),
    "inst": (b"\x80\x02(iposix\nsystem\n.", "the opcode INST, which describes no tensor"),
    "newobj": (b"\x80\x02ccollections\nOrderedDict\n)\x81.", "the opcode NEWOBJ, which describes no tensor"),
    "called": (b"\x80\x02ctorch\nFloatStorage\n)R.", "torch FloatStorage is called"),
    "no values": (b"\x80\x02s.", "damaged or not a PyTorch zip file"),
    "no memo": (b"\x80\x02h\x07.", "damaged or not a PyTorch zip file"),
    "no end": (b"\x80\x02}", "damaged or not a PyTorch zip file"),
}


@pytest.mark.parametrize("name", PICKLES)
def test_pickles_that_are_no_weights(tmp_path, name):
    description, match = PICKLES[name]
    pickled(tmp_path / "x.bin", description)
    begin = time.monotonic()
    refused(match, TorchPickles, [tmp_path / "x.bin"])
    assert time.monotonic() - begin < 10


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (dict(length=3), "numbers of a are missing"),
        (dict(offset=-1), "a tensor of a shape that there is not"),
        (dict(shape=(2, "3")), "a tensor of a shape that there is not"),
        (dict(shape=(2,)), "a tensor of a shape that there is not"),
        (dict(shape=(True, 2)), "a tensor of a shape that there is not"),
        (dict(shape=3), "found int, expected tuple"),
        (dict(shape=(2**61, 2)), "reaches beyond its storage"),
        (dict(strides=(2, 2)), "reaches beyond its storage"),
    ],
    ids=str,
)
def test_tensors_that_do_not_fit_their_storage(tmp_path, change, match):
    def read(file):
        source = TorchPickles([file])
        return source.read("a", whole(source.tensors["a"].shape))

    class Tensor:
        def __init__(self, values):
            self.values = values

        def __reduce__(self):
            return torch._utils._rebuild_tensor_v2, tuple(self.values.values())

    class Pickler(pickle.Pickler):
        def persistent_id(self, one):
            return ("storage", torch.FloatStorage, "0", "cpu", len(one)) if isinstance(one, range) else None

    def write(values):
        stream = io.BytesIO()
        Pickler(stream, 2).dump({"a": Tensor(values)})
        pickled(tmp_path / "x.bin", stream.getvalue(), np.arange(1000, dtype=np.float32).tobytes())

    good = dict(storage=range(1000), offset=994, shape=(2, 3), strides=(3, 1), grad=False, hooks=OrderedDict())
    write(good)
    np.testing.assert_array_equal(read(tmp_path / "x.bin"), np.arange(994, 1000).reshape(2, 3))
    write(good | (dict(storage=range(1001)) if "length" in change else change))
    refused(match, read, tmp_path / "x.bin")
