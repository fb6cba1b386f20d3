"""Tux Paint's stamps: pictures with a caption beside each, split by caption."""

import pytest
from PIL import Image

from vlm_jax.data.sources.stamps import StampsSource
from vlm_jax.errors import DataError


@pytest.fixture
def folder(tmp_path):
    for name, text in {
        "animals/cat.png": "A cat.\nde.utf8=Eine Katze.\n",
        "animals/cat_2.png": "A cat.\n",
        "animals/cat_mirror.png": "A cat.\n",
        "symbols/alphabets/a.png": "The letter A.\n",
        "food/nothing.png": None,
        **{f"food/{number}.png": f"Food number {number}.\n" for number in range(10)},
    }.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGBA", (4, 3), "red").save(path)
        if text is not None:
            path.with_suffix(".txt").write_text(text)
    return tmp_path


def caption(example):
    (conversation,) = example.conversations
    asked, answer = conversation
    assert asked.role == "user" and not asked.text and not asked.learn and answer.learn
    return answer.text


def test_a_quarter_of_the_captions_is_held_out(folder):
    train, held_out = (StampsSource(folder, split) for split in ("train", "eval"))
    captions = [{caption(source[index]) for index in range(len(source))} for source in (train, held_out)]
    assert not captions[0] & captions[1] and len(captions[1]) == 2
    assert captions[0] | captions[1] == {"A cat."} | {f"Food number {number}." for number in range(10)}
    assert len(train) + len(held_out) == 12  # two pictures of a cat
    assert train.fingerprint != held_out.fingerprint
    (folder / "food/0.txt").write_text("Bread.\n")
    assert {StampsSource(folder, split).fingerprint for split in ("train", "eval")} - {train.fingerprint, held_out.fingerprint}


def test_a_folder_without_stamps_says_how_to_get_them(tmp_path):
    with pytest.raises(DataError, match="install Debian's tuxpaint-stamps-default"):
        StampsSource(tmp_path, "train")


def test_whole_categories_are_held_out(folder):
    (folder / "symbols/cat.png").write_bytes((folder / "animals/cat.png").read_bytes())
    (folder / "symbols/cat.txt").write_text("A cat.\n")
    train, held_out = (StampsSource(folder, split, ("animals",)) for split in ("train", "eval"))
    assert [held_out[index].id for index in range(len(held_out))] == ["stamps animals/cat.png", "stamps animals/cat_2.png"]
    seen = [train[index].id for index in range(len(train))]
    assert len(seen) == 10 and all("food" in name for name in seen)  # the cat among the symbols is in neither
    with pytest.raises(DataError, match="no category 'beasts'; there are animals, food, symbols"):
        StampsSource(folder, "train", ("beasts",))
