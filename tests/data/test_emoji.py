"""Emoji: one drawing style a package, split by name."""

import dataclasses
import json

import pytest
from PIL import Image

from tests.tiny import tiny_run
from vlm_jax.config import EmojiConfig
from vlm_jax.data.pipeline import build_source
from vlm_jax.data.sources.emoji import EmojiSource
from vlm_jax.errors import DataError

NAMES = ["GRINNING FACE", "SLICE OF PIZZA", "DOG  FACE", "ROCKET", "CAT FACE", "RED APPLE", "TULIP", "SNAIL"]


def write(folder, style):
    pictures = folder / "package" / "img" / style / "64"
    pictures.mkdir(parents=True)
    entries = []
    for number, name in enumerate([*NAMES, "KEYCAP 3", "FLAG OF FRANCE"]):
        Image.new("RGB", (64, 64), (number, 0, 0)).save(pictures / f"{number}.png")
        category = {"KEYCAP 3": "Symbols", "FLAG OF FRANCE": "Flags"}.get(name, "Objects")
        entries.append({"name": name, "image": f"{number}.png", "category": category})
    entries.append({"name": "NOT DRAWN", "image": "missing.png", "category": "Objects"})
    (folder / "package" / "emoji.json").write_text(json.dumps(entries))
    return folder


def names(source):
    return [source[index].conversations[0][1].text for index in range(len(source))]


def test_no_held_out_name_is_in_training_in_any_style(tmp_path):
    google, twitter = (write(tmp_path / style, style) for style in ("google", "twitter"))
    train, held_out = (EmojiSource(google, split) for split in ("train", "eval"))
    assert sorted(names(train) + names(held_out)) == sorted(" ".join(name.lower().split()) for name in NAMES)
    assert len(held_out) == 2 and not set(names(train)) & set(names(held_out))
    assert train.fingerprint != held_out.fingerprint != EmojiSource(twitter, "eval").fingerprint
    data = tiny_run().data
    both = dataclasses.replace(data, source=EmojiConfig(folder=str(google), eval_folder=str(twitter)))
    drawn = build_source(both, "eval")
    assert names(drawn) == names(held_out) and "/img/twitter/64/" in drawn[0].media[0][0]
    assert names(build_source(both, "train")) == names(train) and drawn[0].id.startswith("emoji twitter ")


def test_another_folder_says_what_to_do(tmp_path):
    with pytest.raises(DataError, match="npm pack emoji-datasource-google"):
        EmojiSource(tmp_path, "train")
    write(tmp_path, "google")
    (tmp_path / "package" / "img" / "google" / "64").rename(tmp_path / "package" / "img" / "google" / "32")
    with pytest.raises(DataError, match="no package/img/STYLE/64"):
        EmojiSource(tmp_path, "train")
