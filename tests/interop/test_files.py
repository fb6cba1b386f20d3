"""Weights on disk: read in parts, and refused in one clear line when anything about them is wrong."""

import json
import os
import struct

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from vlm_jax.interop.files import safetensors_files
from vlm_jax.interop.files.folder import check_processing, find, open_weights, read_config
from vlm_jax.interop.files.safetensors_files import INDEX, NAME, SafetensorsFiles
from vlm_jax.interop.files.source import PublishedError
from vlm_jax.interop.files.torch_pickle import TorchPickles
from vlm_jax.interop.plan import plan
from vlm_jax.interop.table import Table, row


def tensors() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        "a": rng.random((4, 6), np.float32),
        "b": rng.random((5,)).astype(ml_dtypes.bfloat16),
        "c": np.array(3.5, np.float32),
        "d": rng.random((3, 2, 4)).astype(np.float16),
    }


def whole(shape):
    return tuple(slice(0, size) for size in shape)


@pytest.fixture
def sharded(tmp_path):
    """A folder of several files and an index."""
    safetensors_files.write(tmp_path, tensors().items(), shard_bytes=100)
    assert len(list(tmp_path.glob("*.safetensors"))) == 2
    return tmp_path


def test_parts_of_tensors(sharded):
    source = open_weights(sharded)
    for name, tensor in tensors().items():
        assert (source.tensors[name].shape, source.tensors[name].dtype) == (tensor.shape, tensor.dtype)
        np.testing.assert_array_equal(source.read(name, whole(tensor.shape)), tensor)
    part = (slice(1, 3), slice(2, 5))
    np.testing.assert_array_equal(source.read("a", part), tensors()["a"][part])


def test_an_exported_folder_is_what_transformers_reads(sharded):
    from transformers.modeling_utils import load_state_dict

    index = json.loads((sharded / INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors().values())
    found = {}
    for file in sorted(set(index["weight_map"].values())):
        found |= load_state_dict(sharded / file)
    assert found.keys() == tensors().keys()
    np.testing.assert_array_equal(found["a"].numpy(), tensors()["a"])


def refused(match, read, *args, **kwargs):
    with pytest.raises(PublishedError, match=match) as error:
        read(*args, **kwargs)
    assert "\n" not in str(error.value)


def rewrite_header(file, change):
    """The same file with another header."""
    content = file.read_bytes()
    size = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8 : 8 + size])
    change(header)
    new = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(new)) + new + content[8 + size :])


def test_truncated_and_lying_files(tmp_path):
    file = tmp_path / NAME
    save_file(tensors(), file)
    good = file.read_bytes()
    for size in (0, 4, 60, len(good) - 1):
        file.write_bytes(good[:size])
        refused(f"{NAME} is damaged or cut short", open_weights, tmp_path)
    file.write_bytes(struct.pack("<Q", 2**60) + good[8:])  # a header longer than any file
    refused(f"{NAME} is damaged or cut short", open_weights, tmp_path)
    for lie in (
        lambda header: header["a"].update(shape=[4, 7]),
        lambda header: header["a"].update(data_offsets=[0, 10**9]),
        lambda header: header["a"].update(data_offsets=[-8, 88]),
        lambda header: header["a"].update(dtype="F99"),
        lambda header: header["a"].update(shape=[2**40, 2**40]),
        lambda header: header["d"].update(data_offsets=header["a"]["data_offsets"]),
    ):
        file.write_bytes(good)
        rewrite_header(file, lie)
        refused(f"{NAME} is damaged or cut short", open_weights, tmp_path)


def test_a_quantised_file_is_refused(tmp_path):
    file = tmp_path / NAME
    save_file({"a": np.zeros((4, 6), ml_dtypes.float8_e4m3fn)}, file)
    refused("a is of type F8_E4M3; expected one of .* take the original", open_weights, tmp_path)


def change_index(folder, change):
    index = json.loads((folder / INDEX).read_text())
    change(index["weight_map"])
    (folder / INDEX).write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda names: names.update(a="model-00009-of-00009.safetensors"), "names model-00009.* which is not in"),
        (lambda names: names.update(a="../secret.safetensors"), r"names the file '\.\./secret.*only files in its own folder"),
        (lambda names: names.update(a="/etc/passwd"), "only files in its own folder"),
        (lambda names: names.update(a=".."), "only files in its own folder"),
        (lambda names: names.update(a=7), "damaged|only files in its own folder"),
        (lambda names: names.update(e=names["a"]), "do not agree on 1 tensors, e among them.*it is in no file"),
        (lambda names: names.pop("b"), "do not agree on 1 tensors, b among them.*the index says nothing"),
    ],
    ids=["missing file", "traversal", "absolute", "parent", "number", "surplus name", "missing name"],
)
def test_a_wrong_index(sharded, change, match):
    save_file(tensors(), sharded.parent / "secret.safetensors")
    change_index(sharded, change)
    refused(match, open_weights, sharded)


def test_an_index_that_is_no_json(sharded):
    (sharded / INDEX).write_text("{")
    refused("index.json is damaged", open_weights, sharded)


def test_no_weights(tmp_path):
    refused("holds no weights: expected model.safetensors", open_weights, tmp_path)


def test_a_tensor_in_two_files(tmp_path):
    for name in ("x.safetensors", "y.safetensors"):
        save_file({"a": np.zeros(3, np.float32)}, tmp_path / name)
    refused("both hold a; leave one", SafetensorsFiles, [tmp_path / "x.safetensors", tmp_path / "y.safetensors"])


def test_weights_of_another_type(tmp_path):
    """Integers of the same size, as a header says that was changed."""
    table, shapes = Table((row("a", "a", "D F -> D F"),)), {"a": (4, 6)}
    for dtype, match in (
        ("F32", None),
        ("I32", r"a: found int32, expected floating-point numbers"),
        ("BOOL", "damaged or cut"),
    ):
        save_file({"a": tensors()["a"]}, tmp_path / NAME)
        rewrite_header(tmp_path / NAME, lambda header, dtype=dtype: header["a"].update(dtype=dtype))
        if match is None:
            assert plan(table, open_weights(tmp_path), shapes)
        else:
            with pytest.raises(ValueError, match=match):
                plan(table, open_weights(tmp_path), shapes)


def test_only_regular_files(tmp_path):
    """A FIFO would be waited for for ever."""
    for name, read in {
        NAME: open_weights,
        INDEX: open_weights,
        "config.json": lambda folder: read_config(folder, ("llama",)),
        "tokenizer.json": check_processing,
        "x.safetensors": lambda folder: SafetensorsFiles([folder / "x.safetensors"]),
        "x.bin": lambda folder: TorchPickles([folder / "x.bin"]),
        "chat_template.jinja": check_processing,
    }.items():
        os.mkfifo(tmp_path / name)
        refused(f"{name}.* is not a regular file|holds no weights", read, tmp_path)
        (tmp_path / name).unlink()


def test_the_hubs_cache_and_missing_folders(tmp_path):
    cache = tmp_path / "models--a--b"
    for number, revision in enumerate(("old", "new")):
        folder = cache / "snapshots" / revision
        folder.mkdir(parents=True)
        save_file({"a": np.full(2, number, np.float32)}, folder / NAME)
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text("new\n")
    assert open_weights(find(cache)).read("a", (slice(0, 2),))[0] == 1
    refused("no checkpoint at .*nowhere: there is no such folder", find, tmp_path / "nowhere")
    refused("no checkpoint org/name: .*cannot be fetched from the hub .*Check the name", find, "org/name")


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ('{"model_type": "flying_carpet"}', "model_type 'flying_carpet' cannot be read; those that can are llama, llava"),
        ("{}", "model_type None cannot be read"),
        ("{", "config.json is damaged"),
        ("[]", "config.json is damaged: it holds .*, no object"),
        ('{"model_type": ["llama"]}', r"model_type \['llama'\] cannot be read"),
        ('{"model_type": "llama", "hidden_size": "many"}', r'config.json: hidden_size="many" \(expected a whole number from 1'),
        ('{"model_type": "llama", "hidden_size": 30, "num_attention_heads": 4}', "config.json cannot be used"),
        ('{"model_type": "llama", "rms_norm_eps": NaN}', "config.json is damaged: it has the number nan"),
        ('{"model_type": "llama", "rms_norm_eps": 1e999}', "config.json is damaged: it has the number inf"),
        ('{"model_type": "llama", "text_config": 3}', r"text_config=3 \(expected an object or null\)"),
        ('{"model_type": "llama", "a_config": {"b_config": {"vocab_size": 0}}}', "a_config.b_config.vocab_size=0"),
        ('{"model_type": "llama", "rope_scaling": {"factor": 0}}', r"rope_scaling.factor=0 \(expected a number above 0"),
        ('{"model_type": "llama", "rope_scaling": []}', r"rope_scaling=\[\] \(expected an object with some of"),
        (
            '{"model_type": "llama", "vocab_size": 0, "hidden_size": 0, "head_dim": 0, "n_heads": 0}',
            "; .*; .*, and 1 more: corr",
        ),
    ],
)
def test_a_configuration_that_cannot_be_used(tmp_path, content, match):
    (tmp_path / "config.json").write_text(content)
    refused(match, read_config, tmp_path, ("llama", "llava"))
