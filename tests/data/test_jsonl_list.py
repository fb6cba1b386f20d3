"""A `.json` file that holds a list of records, read in blocks."""

import json
import tracemalloc

import pytest
from data_helpers import chat, opened, picture, store_of, write_lines

from vlm_jax.data.sources import jsonl
from vlm_jax.errors import DataError


@pytest.fixture
def root(tmp_path):
    picture(tmp_path / "a.png")
    return tmp_path


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_a_list_file(root, indent, end):
    records = [chat(f"Zürich 猫 {index}\n[", "A", image="a.png") for index in range(5)]
    text = json.dumps(records, indent=indent, ensure_ascii=False).replace("\n", end)
    (root / "x.json").write_bytes(b"\xef\xbb\xbf" + text.encode())
    got = opened(root / "x.json")
    assert len(got) == 5
    assert [got[index].conversations[0][0].text for index in range(5)] == [f"Zürich 猫 {index}\n[" for index in range(5)]
    text = text.replace('"a.png"', '"none.png"')
    (root / "x.json").write_text(text)
    with pytest.raises(DataError, match=rf"x\.json:{2 if indent else 1}: .*none.png"):
        store_of(opened(root / "x.json"))


def test_a_broken_list_file(root):
    for text, cause in [("{}", r"x\.json:1: expected a list"), ('[\n{"id": 1},\n{"id" 2}]', r"x\.json:3: is not JSON")]:
        (root / "x.json").write_text(text)
        with pytest.raises(DataError, match=cause):
            opened(root / "x.json")


LISTS = {
    "letters of 2, 3 and 4 bytes": [chat(f"Zü {index} 猫🙂", "é" * index) for index in range(6)],
    "brackets, quotes and escapes": [chat('[{"\\"]},', "\\u00fc ]\n", id=index, more=[[], {}, "]"]) for index in range(4)],
    "long and short": [chat("a" * 300, "b"), chat("", "c"), chat("🙂" * 100, "d")],
}


@pytest.mark.parametrize("block", [1, 2, 3, 7, 64, 10_000])
@pytest.mark.parametrize("indent", [None, 1])
@pytest.mark.parametrize("name", LISTS)
def test_a_list_is_read_in_blocks(root, monkeypatch, block, indent, name):
    """Wherever a block ends, within a letter or an escape, each record's line and bytes are exact."""
    monkeypatch.setattr(jsonl, "BLOCK", block)
    records = LISTS[name]
    text = b"\xef\xbb\xbf \r\n" + json.dumps(records, indent=indent, ensure_ascii=False).replace("\n", "\r\n").encode() + b"\n"
    (root / "x.json").write_bytes(text)
    found = list(jsonl._list_records(root / "x.json"))
    assert [json.loads(text[start : start + size]) for _, start, size in found] == records
    for line, start, size in found:
        assert text[start : start + 1] == b"{" and text[start + size - 1 : start + size] == b"}"
        assert line == 1 + text[:start].count(b"\n")


def test_a_long_list_is_never_in_memory_as_a_whole(root, monkeypatch):
    monkeypatch.setattr(jsonl, "BLOCK", 1000)
    write_lines(root / "x.json", [json.dumps([chat("a" * 900, "b")] * 400)])
    tracemalloc.start()
    try:
        assert sum(1 for _ in jsonl._list_records(root / "x.json")) == 400
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert most < (root / "x.json").stat().st_size / 4


@pytest.mark.parametrize("block", [1, 5, 10_000])
@pytest.mark.parametrize(
    ("text", "cause"),
    [
        ('[{"id": 1},\n{"id": 2}', "2: is not JSON: the list is not closed"),
        ('[{"id": 1},\n{"id": ', "2: is not JSON: Expecting value"),
        ('[{"id": 1},\n{"a": [\n1 2]}]', "3: is not JSON: Expecting ',' delimiter"),
        ("[", "1: is not JSON: the list is not closed"),
        ('[{"id": 1 2},\n{"id": 2}]\n\n', "1: is not JSON: Expecting ',' delimiter"),
        ("", "1: expected a list"),
        ('["' + "[" * 9, "1: is not JSON: Unterminated string"),
    ],
)
def test_where_a_list_in_blocks_is_broken(root, monkeypatch, block, text, cause):
    monkeypatch.setattr(jsonl, "BLOCK", block)
    (root / "x.json").write_text(text)
    with pytest.raises(DataError, match=rf"x\.json:{cause}"):
        opened(root / "x.json")


def test_a_closed_list_without_records(root):
    (root / "x.json").write_text("[ ]")
    with pytest.raises(DataError, match=r"x\.json: holds no example"):
        opened(root / "x.json")
