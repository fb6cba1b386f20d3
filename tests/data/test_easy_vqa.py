import dataclasses
import logging
import shutil
import subprocess
import sys

import numpy as np
import pytest
from data_helpers import processor_of

from vlm_jax.config import EasyVqaPairsConfig
from vlm_jax.data.pipeline import build_source
from vlm_jax.data.sources.easy_vqa import EasyVqaSource, prepare
from vlm_jax.errors import DataError
from vlm_jax.processing.conversation import Medium, Text, assistant, media_of, user
from vlm_jax.processing.pictures import read_image

CODE = """
import sys
from vlm_jax.data.sources.easy_vqa import EasyVqaSource
for split, counts in (("train", (4000, 38575)), ("test", (1000, 9673))):
    source = EasyVqaSource(split, sys.argv[1])
    assert (len(source), sum(len(source[index].conversations) for index in range(len(source)))) == counts
assert not {"tensorflow", "torch"} & set(sys.modules)
import vlm_jax.data.pipeline
assert not {"tensorflow", "torch"} & set(sys.modules)
"""


def test_counts_without_tensorflow(easy_vqa_folder):
    subprocess.run([sys.executable, "-c", CODE, str(easy_vqa_folder)], check=True)


def test_it_is_the_set_of_the_package(easy_vqa_folder):
    import easy_vqa
    from PIL import Image

    source = EasyVqaSource("test", easy_vqa_folder)
    paths = easy_vqa.get_test_image_paths()
    asked = {}
    for question, answer, image in zip(*easy_vqa.get_test_questions(), strict=True):
        asked.setdefault(image, []).append((question, answer))
    seen = set()
    for index in range(len(source)):
        example = source[index]
        name = int(example.id.rsplit("/", 1)[1])
        seen.add(name)
        expected = tuple((user(Medium(0), Text(question)), assistant(answer)) for question, answer in asked[name])
        assert example.conversations == expected
        if index % 100 == 0:
            with Image.open(paths[name]) as image:
                np.testing.assert_array_equal(read_image(example.media[0][0]), np.asarray(image))
    assert seen == set(paths)


def test_a_word_is_a_token(easy_vqa_config):
    import easy_vqa

    source = build_source(easy_vqa_config, "train")
    tokenizer = processor_of(easy_vqa_config, source).tokenizer
    assert tokenizer.vocab_size <= 512
    for question in sorted(set(easy_vqa.get_train_questions()[0])):
        words = question.removesuffix("?").split()
        pieces = [tokenizer.decode([token]) for token in tokenizer.encode(question)]
        assert pieces == [words[0], *(f" {word}" for word in words[1:]), "?"]
    for answer in easy_vqa.get_answers():
        assert len(tokenizer.encode(f" {answer}")) == 1


def test_interrupted_half_way(tmp_path, monkeypatch):
    from vlm_jax.data.sources import easy_vqa as module

    class Interrupted:
        def download_and_prepare(self):
            raise KeyboardInterrupt

    monkeypatch.setattr(module, "_builder", lambda folder: Interrupted())
    with pytest.raises(KeyboardInterrupt):
        prepare(tmp_path / "new")
    assert list((tmp_path / "new").iterdir()) == []


def test_another_process_is_first(tmp_path, monkeypatch):
    from vlm_jax.data.sources import easy_vqa as module

    class Slow:
        def __init__(self, folder):
            self.folder = folder

        def download_and_prepare(self):
            for place, name in [(self.folder, "mine"), (tmp_path / "new", "theirs")]:
                (place / "easy_vqa").mkdir()
                (place / "easy_vqa" / name).touch()

    monkeypatch.setattr(module, "_builder", Slow)
    prepare(tmp_path / "new")
    found = [str(path.relative_to(tmp_path)) for path in (tmp_path / "new").rglob("*")]
    assert found == ["new/easy_vqa", "new/easy_vqa/theirs"]


def test_prepared_once_and_said_so(easy_vqa_folder, caplog):
    with caplog.at_level(logging.INFO):
        prepare(easy_vqa_folder)
    assert "preparing" not in caplog.text


def test_damaged(easy_vqa_folder, tmp_path):
    shutil.copytree(easy_vqa_folder, tmp_path / "copy")
    for file in (tmp_path / "copy").rglob("*-train*"):
        file.unlink()
    with pytest.raises(DataError, match=r"easy-VQA in .*copy: .*Delete"):
        EasyVqaSource("train", tmp_path / "copy")
    shutil.rmtree(tmp_path / "copy/easy_vqa")
    (tmp_path / "copy/easy_vqa").mkdir()
    with pytest.raises(DataError, match=r"easy-VQA in .*copy: .*Delete"):
        EasyVqaSource("train", tmp_path / "copy")
    source = EasyVqaSource("test", easy_vqa_folder)
    with pytest.raises(DataError, match="9672 questions of 'test', expected 9673"):
        source.check(9672)


def test_the_questions_about_a_picture_as_one_conversation(easy_vqa_folder):
    apart, together = (EasyVqaSource("train", easy_vqa_folder, conversations=one) for one in (False, True))
    example, same = apart[0], together[0]
    assert same.media == example.media and len(same.conversations) == 1 < len(example.conversations)
    assert [turn.text for turn in same.conversations[0]] == [turn.text for one in example.conversations for turn in one]
    assert media_of(same.conversations[0]) == [0] and [turn.learn for turn in same.conversations[0]][:2] == [False, True]
    assert together.fingerprint != apart.fingerprint
    together.check(4_000)
    with pytest.raises(DataError, match="38575 conversations"):
        together.check(38_575)


def test_easy_vqa_pairs_are_of_the_training_split_and_apart_from_those_held_out(easy_vqa_config, easy_vqa_folder):
    config = dataclasses.replace(easy_vqa_config, source=EasyVqaPairsConfig(cache_dir=str(easy_vqa_folder)), pairs=True)
    splits = {split: build_source(config, split) for split in ("train", "eval")}
    assert {split: len(source) for split, source in splits.items()} == {"train": 3600, "eval": 400}
    whole = EasyVqaSource("train", easy_vqa_folder)
    ids = {split: {source[index].id for index in range(0, len(source), 100)} for split, source in splits.items()}
    assert not ids["train"] & ids["eval"] and all("train/" in one for of_split in ids.values() for one in of_split)
    example, original = splits["train"][0], whole[1]
    assert (example.id, example.media, example.pairs) == (original.id, original.media, True)
    assert example.conversations[::2] == original.conversations
    for chosen, rejected in zip(example.conversations[::2], example.conversations[1::2], strict=True):
        assert chosen[0] == rejected[0] and chosen[1].text != rejected[1].text
