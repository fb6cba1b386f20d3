"""Tar shards: webdataset's layout, captions, records and documents."""

import io
import json
import pickle
import tarfile

import numpy as np
import pytest
from data_helpers import chat, opened, parts, run_config, store_of, text_of, write_lines
from PIL import Image

from vlm_jax.config import DataConfig, TarConfig
from vlm_jax.data.pipeline import TrainBatches, tokens_of
from vlm_jax.data.sources import tar
from vlm_jax.data.sources.tar import TarSource, shards_of
from vlm_jax.errors import DataError
from vlm_jax.processing.conversation import plain_text
from vlm_jax.processing.pictures import read_image


def png(grey):
    out = io.BytesIO()
    Image.new("RGB", (8, 8), (grey,) * 3).save(out, "PNG")
    return out.getvalue()


def shard(path, files):
    """
    Args:
      files: name -> bytes, text, or a value for JSON.
    """
    with tarfile.open(path, "w") as out:
        for name, value in files.items():
            raw = value if isinstance(value, bytes) else (value if isinstance(value, str) else json.dumps(value)).encode()
            info = tarfile.TarInfo(name)
            info.size = len(raw)
            out.addfile(info, io.BytesIO(raw))
    return path


def greys(example):
    return [int(read_image(frame).mean()) for (frame,) in example.media]


def source_of(tmp_path, *shards):
    return TarSource(list(shards), cache_dir=tmp_path / "cache")


@pytest.fixture
def kinds(tmp_path):
    """A sample of each kind, in two shards."""
    one = shard(
        tmp_path / "00.tar",
        {
            "000.jpg": png(10),
            "000.txt": " a cat\n",
            "000.json": {"caption": "not this", "width": 8, "image_id": 7},
            "x/001.0.png": png(20),
            "x/001.1.png": png(30),
            "x/001.json": chat("<image> and <image>?", "two"),
            "002.json": chat("words alone", "yes"),
        },
    )
    image = {"type": "image", "image": "003.png"}
    two = shard(
        tmp_path / "01.tar",
        {
            "003.png": png(40),
            "003.json": {"messages": [{"role": "user", "content": [image]}, {"role": "assistant", "content": "x"}]},
            "004.png": png(50),
            "004.json": {"caption": "a dog"},
            "005.b.webp": png(60),
            "005.a.webp": png(70),
            "005.json": {"content": [{"image": "a.webp"}, {"text": "A"}, {"image": "005.b.webp"}]},
            "006.jpg": png(80),
            "006.json": {"texts": ["Before.", None], "images": [None, "https://example.org/some/dog.jpg"]},
        },
    )
    return source_of(tmp_path, one, two)


def test_each_kind_of_sample(kinds):
    examples = [kinds[index] for index in range(len(kinds))]
    assert [plain_text(example.conversations[0]) for example in examples] == [
        "a cat", "and ? two", "words alone yes", "x", "a dog", "A", "Before.",
    ]  # fmt: skip
    assert list(map(greys, examples)) == [[10], [20, 30], [], [40], [50], [70, 60], [80]]
    assert examples[1].id.endswith("00.tar:x/001") and examples[3].id.endswith("01.tar:003")


def test_shards_train_like_any_source(kinds, tmp_path):
    data = DataConfig(
        source=TarConfig(train=str(tmp_path / "0{0..1}.tar"), eval=str(tmp_path / "00.tar")),
        vocab_size=300, image_size=8, rows=2, tokens=120, images=4, cache_dir=str(tmp_path / "cache"), workers=0,
    )  # fmt: skip
    processor, source = parts(data)
    whole = list(TrainBatches(run_config(data, 6), processor, source))
    again = list(TrainBatches(run_config(data, 6), processor, pickle.loads(pickle.dumps(source)), start=3))
    np.testing.assert_array_equal(again[0].images, whole[3].images)
    np.testing.assert_array_equal(again[0].tokens, whole[3].tokens)
    assert len(tokens_of(data, processor, source)) == 7


def test_the_index_is_made_once(kinds, tmp_path, monkeypatch):
    monkeypatch.setattr(tar, "_files_of", lambda *_: pytest.fail("read again"))
    again = source_of(tmp_path, tmp_path / "00.tar", tmp_path / "01.tar")
    assert again.fingerprint == kinds.fingerprint and greys(again[5]) == [70, 60]


def test_what_is_wrong_with_a_sample_is_named(tmp_path):
    source = source_of(tmp_path, shard(tmp_path / "x.tar", {
        "0.jpg": png(1),
        "1.txt": "no picture",
        "2.jpg": png(1), "2.json": chat("<image>", "x", image="other.txt"),
        "3.jpg": png(1), "3.json": "{",
        "4.jpg": b"no picture", "4.txt": "x",
    }))  # fmt: skip
    for index, message in enumerate([
        r"x\.tar:0: has no text: expected 0\.txt, or \.json .*; it has jpg",
        r"x\.tar:1: has a caption and no picture; it has txt",
        r"x\.tar:2: names the picture 'other\.txt'; it has jpg",
        r"x\.tar:3: ",
    ]):  # fmt: skip
        with pytest.raises(DataError, match=message):
            source[index]
    with pytest.raises(DataError, match=r"y\.tar:4: picture .* is not a picture"):
        store_of(source_of(tmp_path, shard(tmp_path / "y.tar", {"4.jpg": b"no picture", "4.txt": "x"})))


def test_a_shard_that_is_none_is_named(tmp_path):
    good = shard(tmp_path / "a.tar", {"0.jpg": png(1), "0.txt": "x"})
    (tmp_path / "short.tar").write_bytes(good.read_bytes()[:600])
    (tmp_path / "b.tar.gz").write_bytes(b"\x1f\x8b00")
    for name, message in {
        "short.tar": r"short\.tar: is no tar file that can be read",
        "b.tar.gz": "gunzip it first",
        "none.tar": "No such file",
    }.items():
        with pytest.raises(DataError, match=message):
            source_of(tmp_path, tmp_path / name)
    with pytest.raises(DataError, match="there is no such file; expected a tar file"):
        shards_of(str(tmp_path / "c*.tar"))
    assert [path.name for path in shards_of("s/{008..011}.tar")] == ["008.tar", "009.tar", "010.tar", "011.tar"]
    source = source_of(tmp_path, good)
    shard(good, {"0.jpg": png(1), "0.txt": "other"})
    with pytest.raises(DataError, match=r"a\.tar: was changed during the run"):
        source[0]


def test_mmc4_pictures_stand_before_the_sentences_they_are_assigned_to(tmp_path):
    """The best assignment as a whole, one picture a sentence; below 0.24 a picture is left out."""
    for number in range(3):
        Image.new("RGB", (8, 8), (number,) * 3).save(tmp_path / f"{number}.png")
    record = {
        "text_list": ["One.", "Two.", "Three."],
        "image_info": [{"image_name": f"{number}.png"} for number in range(3)],
        "similarity_matrix": [[0.30, 0.29, 0.0], [0.31, 0.1, 0.0], [0.0, 0.0, 0.2]],
        "url": "https://example.org",
    }
    source = opened(write_lines(tmp_path / "x.jsonl", [record, record | {"similarity_matrix": [[0.1] * 3] * 3}]))
    store = store_of(source, skip=True)
    assert text_of(store, 0) == "<BOS><image>One.<EOC><image>Two. Three.<EOC>"
    assert [one[0].rpartition("/")[2] for one in source[0].media] == ["1.png", "0.png"]
    with pytest.raises(DataError, match=r"x\.jsonl:2: no picture is as like to a sentence as 0\.24"):
        source[1]
