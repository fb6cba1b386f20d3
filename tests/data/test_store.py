"""The token store: made once, whatever interrupts it and however many make it, and read ever after."""

import dataclasses
import json
import multiprocessing
import shutil
import threading
import time

import numpy as np
import pytest
from data_helpers import WatchedSource, build_and_wait, byte_tokenizer, picture, store_of, text_of, tokenised_with, write_lines

from vlm_jax.config import SampleRule
from vlm_jax.data import build_store
from vlm_jax.data.build_store import token_store
from vlm_jax.data.example import Example
from vlm_jax.data.pipeline import tokens_of
from vlm_jax.data.sources.jsonl import JsonLinesSource
from vlm_jax.data.store import FIELDS, OFFSETS, TokenStore
from vlm_jax.data.tokenise import DatasetTokenizer
from vlm_jax.errors import DataError
from vlm_jax.processing.conversation import Medium, Text, assistant, user
from vlm_jax.processing.recipe import RecipeProcessor
from vlm_jax.processing.tokenizer import train_tokenizer

# Some examples are left out and some turns dropped, so that these counts are seen to be kept as well.
LEFT_OUT = dict(skip=True, too_long="drop_turns", tokens=60)


@pytest.fixture
def root(tmp_path):
    for index in range(3):
        picture(tmp_path / f"{index}.png", size=(8, 8 * index + 8))
    records = []
    for index in range(14):
        said = [{"from": "human", "value": f"q{index}"}, {"from": "gpt", "value": "a" * (index % 5)}] * (1 + index % 4)
        records.append({"image": [f"{place}.png" for place in range(index % 3)], "conversations": said})
    records[4] = {"no": "record"}
    records[9]["image"] = "none.png"
    write_lines(tmp_path / "x.jsonl", records)
    return tmp_path


def source(root) -> JsonLinesSource:
    return JsonLinesSource(root / "x.jsonl", "", cache_dir=root / "cache")


def contents(store: TokenStore) -> dict[str, bytes]:
    """Of all its files, and its counts but for the time it took and what that changes."""
    names = [f"{field}.bin" for field in FIELDS] + [f"{name}.npy" for name in OFFSETS]
    assert sorted(path.name for path in store.folder.iterdir()) == sorted([*names, "meta.json"])
    counts = {name: value for name, value in store.meta.items() if name not in ("seconds", "checksum")}
    return {name: (store.folder / name).read_bytes() for name in names} | {"counts": json.dumps(counts).encode()}


def test_what_is_kept_of_an_example(root):
    store = store_of(source(root), **LEFT_OUT)
    assert store.example.tolist() == [0, 1, 2, 3, 5, 6, 7, 8, 10, 11, 12, 13]
    assert store.slots.tolist() == [0, 1, 2, 0, 0, 2, 0, 1, 2, 0, 1, 2, 0, 1]
    assert store.meta["problems"] == 2 and store.meta["dropped"] > 0 and store.meta["ids"] == "uint16"
    assert store.media_of(2) == store.sizes_of(2) == [(8, 8), (16, 8)] and store.media_of(4) == []
    assert text_of(store, 2).startswith("<BOS><image><image>Question: q2 Answer: aa<EOC>Question: q2")
    assert [len(store.written(index).tokens) - 1 for index in range(len(store))] == store.lengths.tolist()


def test_a_second_opening_reads(root, monkeypatch, caplog):
    first = contents(store_of(source(root), **LEFT_OUT))
    monkeypatch.setattr(DatasetTokenizer, "chunk", lambda *_, **__: pytest.fail("tokenised again"))
    caplog.clear()
    assert contents(store_of(source(root), **LEFT_OUT)) == first
    assert "2 of 14 examples are left out" in caplog.text  # it is said every time
    assert "turns are left out of conversations that are too long" in caplog.text


def test_a_damaged_store_is_not_read(root):
    folder = store_of(source(root), **LEFT_OUT).folder
    for name in ("tokens.bin", "file_bytes.bin", "offsets.npy", "meta.json"):
        path = folder / name
        intact = path.read_bytes()
        middle = len(intact) // 2
        flipped = intact[:middle] + bytes([intact[middle] ^ 4]) + intact[middle + 1 :]
        for damaged in (intact[:middle], flipped):
            path.write_bytes(damaged)
            with pytest.raises(DataError, match=f"{folder.name} is damaged: remove it"):
                store_of(source(root), **LEFT_OUT)
        path.write_bytes(intact)
    store_of(source(root), **LEFT_OUT)


def test_whatever_the_tokens_depend_on_makes_another_store(root):
    (root / "x.jsonl").write_text("".join((root / "x.jsonl").read_text().splitlines(keepends=True)[:4]))

    def folder(processor=None, **changes) -> str:
        data, own = tokenised_with(source(root), **changes)
        return token_store(data, processor or own, source(root), skip=changes.get("skip", False)).folder.name

    first = folder()
    assert folder(rows=7, workers=3, sequences_per_image=2, augment=tokenised_with(None)[0].augment) == first
    data, _ = tokenised_with(source(root))
    others = [
        folder(prompt="{question}"),
        folder(answer="{answer}"),
        folder(RecipeProcessor(train_tokenizer(["Question: q"] * 9, 270), data)),
        folder(tokens=399),
        folder(images=3),
        folder(frames=1),
        folder(image_size=16),
        folder(image_fit="crop"),
        folder(too_long="drop_turns"),
        folder(check_pictures=True),
        folder(sampling=(SampleRule(pattern="q", share=0.5),)),
        folder(sampling=(SampleRule(pattern="q", share=0.25),)),
        token_store(data, RecipeProcessor(byte_tokenizer(), data), source(root), skip=True).folder.name,
    ]
    with (root / "x.jsonl").open("a") as file:
        file.write('{"content": [{"text": "more"}]}\n')
    others.append(folder())
    assert len({first, *others}) == 1 + len(others)


@pytest.mark.parametrize("killed", [False, True])
@pytest.mark.parametrize("stop_at", [0, 1, 5, 6, 13])
def test_an_interrupted_build_goes_on_where_it_stopped(root, monkeypatch, stop_at, killed):
    whole = contents(store_of(source(root), **LEFT_OUT))
    monkeypatch.setattr(build_store, "CHUNK", 2)
    monkeypatch.setattr(build_store, "SAVE_S", -1.0)
    monkeypatch.setattr(build_store, "MAX_CHUNKS_ALONE", 99)
    # A process that is killed closes no file: what is on disk at that moment is all there is.
    stopped = lambda: shutil.copytree(root / "interrupted", root / "killed")
    with pytest.raises(KeyboardInterrupt):
        store_of(WatchedSource(source(root), stop_at, stopped), **LEFT_OUT, cache_dir=str(root / "interrupted"))
    left = root / ("killed" if killed else "interrupted")
    (part,) = left.glob("*.part")
    for file in part.glob("*.bin"):  # what was written after the last save
        file.write_bytes(file.read_bytes() + b"rest of a chunk")
    watched = WatchedSource(source(root))
    assert contents(store_of(watched, **LEFT_OUT, cache_dir=str(left))) == whole
    assert watched.read == list(range(stop_at // 2 * 2, 14))
    assert not list(left.glob("*.part"))


def test_a_build_that_is_stopped_by_a_bad_line_goes_on_once_it_is_mended(root, monkeypatch):
    """A picture is put where one was missing: the examples before it are not tokenised again."""
    monkeypatch.setattr(build_store, "CHUNK", 2)
    monkeypatch.setattr(build_store, "SAVE_S", -1.0)
    lines = (root / "x.jsonl").read_text().splitlines()
    write_lines(root / "x.jsonl", lines[:4] + lines[5:])
    with pytest.raises(DataError, match=r"x\.jsonl:9: .*none\.png: there is no such file"):
        store_of(source(root))
    picture(root / "none.png")
    watched = WatchedSource(source(root))
    store = store_of(watched)
    assert watched.read == list(range(8, 13)) and len(store) == 13


def test_processes_make_the_same_bytes(root, monkeypatch):
    whole = contents(store_of(source(root), **LEFT_OUT))
    monkeypatch.setattr(build_store, "CHUNK", 2)
    monkeypatch.setattr(build_store, "MAX_CHUNKS_ALONE", 0)
    monkeypatch.setattr(build_store.os, "cpu_count", lambda: 2)
    here = []
    chunk = DatasetTokenizer.chunk
    monkeypatch.setattr(DatasetTokenizer, "chunk", lambda *args, **more: here.append(args) or chunk(*args, **more))
    assert contents(store_of(source(root), **LEFT_OUT, cache_dir=str(root / "other"))) == whole
    assert not here
    with pytest.raises(DataError, match=r"x\.jsonl:5: has the keys \['no'\]"):  # the first, whoever finds one first
        store_of(source(root), cache_dir=str(root / "third"))
    deadline = time.monotonic() + 20  # they were told to end
    while multiprocessing.active_children() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not multiprocessing.active_children()


def test_two_processes_make_one_store(root):
    """The other process is stopped in the middle; this one waits for it, and tokenises nothing."""
    context = multiprocessing.get_context("spawn")
    begun, go_on = context.Event(), context.Event()
    there = WatchedSource(source(root), begun=begun, go_on=go_on)
    process = context.Process(target=build_and_wait, args=(there, LEFT_OUT, str(root / "cache")))
    process.start()
    here, found = WatchedSource(source(root)), []
    thread = threading.Thread(target=lambda: found.append(store_of(here, **LEFT_OUT, cache_dir=str(root / "cache"))))
    try:
        assert begun.wait(60)
        thread.start()
        thread.join(0.5)
        assert thread.is_alive() and not here.read
    finally:
        go_on.set()
    thread.join(60)
    process.join(60)
    assert process.exitcode == 0 and not here.read and len(found[0]) == 12


def test_a_cache_that_cannot_be_written(root):
    with pytest.raises(DataError, match=r"x\.jsonl/cache: Not a directory \(data\.cache_dir="):
        store_of(source(root), **LEFT_OUT, cache_dir=str(root / "x.jsonl" / "cache"))


def test_one_source_of_two_configurations(root):
    """A source's store is kept open, for this very configuration."""
    write_lines(root / "x.jsonl", (root / "x.jsonl").read_text().splitlines()[:4])
    one = source(root)
    long, processor = tokenised_with(one)
    short = dataclasses.replace(long, tokens=60, too_long="drop_turns")
    store = tokens_of(long, processor, one)
    assert tokens_of(long, processor, one) is store
    assert tokens_of(short, processor, one).lengths.max() <= 60 < store.lengths.max()


class LargeIds:
    """A letter is a token beyond those of 16 bits."""

    pad_id, bos_id, eos_id, image_id, eoc_id = range(5)
    vocab_size = 70_128
    serialised = "large"

    def encode_offsets(self, text):
        return [70_000 + ord(letter) for letter in text], [(place, place + 1) for place in range(len(text))]


class Listed(list):
    fingerprint = "listed"


def test_a_large_vocabulary(tmp_path):
    data, _ = tokenised_with(None, cache_dir=str(tmp_path), prompt="{question}", answer="{answer}")
    examples = Listed([Example("1", (), ((user(Text("Q")), assistant("A")),))])
    store = token_store(data, RecipeProcessor(LargeIds(), data), examples, skip=False)
    assert store.written(0).tokens.tolist() == [1, 70_081, 70_065, 4] and store.meta["ids"] == "int32"


def test_conversations_that_share_media(tmp_path):
    """Each has a range of its example's."""
    pixels = [np.zeros((8, 8 * index, 3), np.uint8) for index in range(1, 4)]
    ranges = [(0, 2), (1, 3), (2, 3), (0, 0)]
    said = [(user(*map(Medium, range(*some)), Text("Q")), assistant("A")) for some in ranges]
    media = tuple((one,) for one in pixels)
    store = store_of(Listed([Example("0", (), said[3:]), Example("1", media, tuple(said))]), cache_dir=str(tmp_path))
    assert store.example.tolist() == [0, 1, 1, 1, 1] and store.slots.tolist() == [0, 3]
    widths = [[width for _, width in store.sizes_of(index)] for index in range(5)]
    assert widths == [[], [8, 16], [16, 24], [24], []]
    assert store.first_medium.tolist()[1:4] == [0, 1, 2]
