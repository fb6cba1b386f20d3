"""`python -m vlm_jax.show`: an example as a person, a program and a picture viewer read it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from vlm_jax.config import JsonLinesConfig
from vlm_jax.data.sources.jsonl import JsonLinesSource
from vlm_jax.errors import DataError
from vlm_jax.interop.published import open_published
from vlm_jax.show import Shown

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests" / "processing"))
import references  # noqa: E402

TURNS = [
    {"from": "human", "value": "<image>\nWhat is this?"},
    {"from": "gpt", "value": "A cat."},
    {"from": "human", "value": "<image>And this?"},
    {"from": "gpt", "value": "A dog that runs."},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("shown")
    for name, size in (("a.png", (90, 40)), ("b.png", (40, 120))):
        Image.new("RGB", size, (200, 30, 10)).save(folder / name)
    without = [TURNS[0] | {"value": "Hi"}, TURNS[1]]
    records = [{"image": ["a.png", "b.png"], "conversations": TURNS}, {"conversations": without}]
    (folder / "data.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    for name in ("llava", "llava_next", "idefics"):
        references.FAMILIES[name].make(folder / name, "bytes")
    return folder


def shown(folder: Path, family: str, example: int = 0) -> Shown:
    source = JsonLinesSource(folder / "data.jsonl", "", cache_dir=folder / "cache")
    return Shown.of(source, open_published(folder / family).processor, example)


def test_json_says_what_is_learned(folder):
    one = shown(folder, "llava")
    line = json.loads(one.as_json)
    assert len(line["tokens"]) == len(line["learned"]) == len(one.layout.tokens)
    learned = [token for token, flag in zip(line["tokens"], line["learned"], strict=True) if flag]
    assert one.processor.tokenizer.decode(learned) == " A cat. A dog that runs.</s>"
    # The template has no end token between turns, and the model learns all the same to end there.
    assert [one.processor.tokenizer.decode(line["tokens"][: place + 1]).endswith("A cat.") for place in line["ends"]] == [True]
    assert line["text"].count("<image>") == 2 and "What is this?" in line["text"]


def test_print_counts_visual_tokens_tiles_and_media(folder, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "400")
    shown(folder, "llava_next").print()
    out = capsys.readouterr().out
    assert "[<image> x 60]" in out and "picture 1: " in out and "40x90, 4 tiles, 60 visual tokens in the sequence" in out
    assert "A dog that runs.</s>" in out and "newlines" in out
    shown(folder, "idefics").print()
    out = capsys.readouterr().out
    assert "read by cross-attention" in out and "picture 2" in out and "x 60" not in out


def test_the_picture_holds_every_tile(folder, tmp_path):
    one = shown(folder, "llava_next")
    one.draw(tmp_path / "tiles.png")
    drawn = Image.open(tmp_path / "tiles.png").convert("RGB")
    red = sum(1 for pixel in drawn.getdata() if pixel == (200, 30, 10))
    tiles = [tile for medium in one.example.media for tile in one.processor.media.pixels(medium)]
    assert red == sum(int((tile == (200, 30, 10)).all(-1).sum()) for tile in tiles) > 0
    with pytest.raises(DataError, match=r"data\.jsonl:2 has no picture"):
        shown(folder, "llava_next", 1).draw(tmp_path / "none.png")


def test_an_example_that_is_not_there(folder):
    with pytest.raises(DataError, match="--example=2: there are 2, counted from 0"):
        shown(folder, "llava", 2)


def test_from_the_command_line(folder):
    command = [
        sys.executable,
        "-m",
        "vlm_jax.show",
        f"--config=configs/finetune.py:{folder / 'llava'}",
        "--example=1",
        "--json",
    ]
    source = [f"--config.data.source.train={folder / 'data.jsonl'}", f"--config.data.cache_dir={folder / 'cache'}"]
    done = subprocess.run([*command, *source], cwd=ROOT, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["text"] == "<s>USER: Hi ASSISTANT: A cat.</s>"
    assert JsonLinesConfig(train="", eval="").kind == "jsonl"
