"""A small data set of the user's own, and easy-VQA prepared once for all tests."""

from pathlib import Path

import pytest
from data_helpers import picture, write_lines

from vlm_jax.config import AugmentConfig, DataConfig, EasyVqaConfig, JsonLinesConfig
from vlm_jax.data.sources.easy_vqa import EasyVqaSource


@pytest.fixture(scope="session")
def easy_vqa_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tfds")
    EasyVqaSource("test", folder)
    return folder


@pytest.fixture(scope="session")
def easy_vqa_config(easy_vqa_folder) -> DataConfig:
    return DataConfig(
        source=EasyVqaConfig(cache_dir=str(easy_vqa_folder)),
        tokenizer="train",
        prompt="{question}",
        answer=" {answer}",
        image_size=64,
        sequences_per_image=4,
        rows=8,
        tokens=128,
        images=4,
    )


@pytest.fixture
def folder(tmp_path) -> Path:
    """Pictures p0.png..p11.png, each of its own grey, and train.jsonl: 12 lines of 0 to 2 pictures and 1 to 3 turns."""
    for index in range(12):
        picture(tmp_path / f"p{index}.png", (20 * index + 5,) * 3)
    records = []
    for index in range(12):
        images = [f"p{index}.png", f"p{(index + 5) % 12}.png"][: index % 3]
        turns = []
        for turn in range(1 + index % 3):
            turns += [{"from": "human", "value": f"what {index} {turn}?"}, {"from": "gpt", "value": f"that {turn}"}]
        records.append({"id": str(index), "image": images, "conversations": turns})
    write_lines(tmp_path / "train.jsonl", records)
    return tmp_path


@pytest.fixture
def jsonl_config(folder) -> DataConfig:
    return DataConfig(
        source=JsonLinesConfig(train=str(folder / "train.jsonl"), eval=str(folder / "train.jsonl")),
        tokenizer="train",
        vocab_size=300,
        image_size=8,
        rows=4,
        tokens=160,
        images=3,
        augment=AugmentConfig(flip=True, shift=2, colour=0.1),
        cache_dir=str(folder / "cache"),
        workers=0,
    )
