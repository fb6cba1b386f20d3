import json
import logging
import pickle

import pytest
from data_helpers import picture, random_pixels, write_lines
from PIL import Image

from vlm_jax.data.example import ImageAt, Text
from vlm_jax.data.jsonl import JsonLinesSource
from vlm_jax.errors import DataError

PROMPT, ANSWER = "Q: {question} A:", " {answer}"


@pytest.fixture
def root(tmp_path):
    for name in ("a.png", "b.png"):
        picture(tmp_path / name)
    (tmp_path / "sub").mkdir()
    picture(tmp_path / "sub/c.png")
    return tmp_path


def source(root, *records, **options) -> JsonLinesSource:
    path = write_lines(root / "x.jsonl", list(records))
    return JsonLinesSource(path, options.pop("image_root", ""), PROMPT, ANSWER, **options)


def chat(*values, **more) -> dict:
    turns = [{"from": ("human", "gpt")[index % 2], "value": value} for index, value in enumerate(values)]
    return {"id": "1", "conversations": turns} | more


def one(root, record) -> tuple:
    example = source(root, record)[0]
    assert len(example.sequences) == 1
    names = tuple(tuple(frame.split(str(root) + "/")[1] for frame in slot) for slot in example.images)
    return names, example.sequences[0]


@pytest.mark.parametrize("value", ["<image>\nWhat?", "What?\n<image>", "What?", " <image>What?", "<image> What? "])
def test_conversation_with_one_picture(root, value):
    images, parts = one(root, chat(value, "A cat. ", image="a.png"))
    assert images == (("a.png",),)
    assert parts == (ImageAt(0), Text("Q: What? A:", False), Text(" A cat.", True))


def test_conversation_of_several_turns_and_pictures(root):
    record = chat("<image>\n<image>\nSame?", "No.", "And <image> or <image>?", "{answer}", image=["a.png", "b.png"] * 2)
    images, parts = one(root, record)
    assert images == (("a.png",), ("b.png",)) * 2
    assert parts == (
        ImageAt(0),
        ImageAt(1),
        Text("Q: Same? A:", False),
        Text(" No.", True),
        Text("Q: And ", False),
        ImageAt(2),
        Text(" or ", False),
        ImageAt(3),
        Text("? A:", False),
        Text(" {answer}", True),
    )


def test_pictures_without_a_marker_stand_first(root):
    images, parts = one(root, chat("{question}?", "No.", image=["a.png", "sub/c.png"]))
    assert images == (("a.png",), ("sub/c.png",))
    assert parts == (ImageAt(0), ImageAt(1), Text("Q: {question}? A:", False), Text(" No.", True))


def test_conversation_without_a_picture(root):
    assert one(root, chat("Hi", "Ho"))[1] == (Text("Q: Hi A:", False), Text(" Ho", True))


def test_interleaved(root):
    content = [{"image": "a.png"}, {"text": "My <image>."}, {"frames": ["a.png", "b.png"]}, {"text": "Q", "learn": False}]
    images, parts = one(root, {"content": content})
    assert images == (("a.png",), ("a.png", "b.png"))
    assert parts == (ImageAt(0), Text("My <image>.", True), ImageAt(1), Text("Q", False))


BAD = [
    ("{", "is not JSON: Expecting property name"),
    ('{"a": 1} x', "is not JSON: Extra data at column 10"),
    ("[" * 100_000, "is not JSON"),
    ("3", "is 3; expected an object"),
    ({"id": "1"}, r"has the keys \['id'\]; expected 'conversations' or 'content'"),
    (chat("Q", "A") | {"content": []}, "one of them"),
    ({"conversations": "Q"}, "'conversations' is \"Q\"; expected a list"),
    ({"conversations": ["Q"]}, 'turn 1 is "Q"; expected an object'),
    ({"conversations": [{"value": "Q"}]}, "has no 'from'"),
    ({"conversations": [{"from": "human"}]}, "has no 'value'"),
    ({"conversations": [{"from": "human", "value": None}]}, "'value' is null; expected a string"),
    ({"conversations": [{"from": "gpt", "value": "Q"}]}, "turn 1 is from 'gpt'; expected 'human'"),
    (chat("Q"), "nothing to learn"),
    ({"conversations": []}, "nothing to learn"),
    (chat("<image>", "A"), "1 times <image> and 0 pictures"),
    (chat("<image><image>Q", "A", image="a.png"), "2 times <image> and 1 pictures"),
    (chat("Q", "<image>", image="a.png"), "pictures belong to human turns"),
    (chat("Q", "A", image=3), "picture's path is 3; expected a string"),
    (chat("Q", "A", image="none.png"), "none.png: there is no such file"),
    (chat("Q", "A", image="../a.png"), "is outside of"),
    (chat("Q", "A", image="/etc/a.png"), "is outside of"),
    (chat("Q", "A", image="text.png"), "text.png: is not a picture"),
    (chat("Q", "A", image="sub"), "is a directory"),
    (chat("Q\ud800", "A"), "half of a surrogate pair"),
    ({"content": [{"text": "a", "lern": False}]}, "part 1 has the unknown key 'lern'"),
    ({"content": [{"text": "a"}, {"image": "a.png", "text": "b"}]}, "part 2 is .*; expected 'text'"),
    ({"content": [{"image": "a.png", "learn": True}]}, "part 1 is"),
    ({"content": [{"text": "a", "learn": 1}]}, "'learn' is 1; expected true or false"),
    ({"content": [{"text": 3}]}, "'text' is 3; expected a string"),
    ({"content": [{"frames": "a.png"}, {"text": "a"}]}, "'frames' is \"a.png\"; expected a list"),
    ({"content": [{"frames": []}, {"text": "a"}]}, "'frames' is empty"),
    ({"content": ["a"]}, 'part 1 is "a"; expected an object'),
]


@pytest.mark.parametrize(("record", "cause"), BAD, ids=range(len(BAD)))
def test_a_bad_line_is_named(root, record, cause):
    (root / "text.png").write_text("hello")
    with pytest.raises(DataError, match=cause) as error:
        source(root, chat("Q", "A"), "", record)
    assert str(error.value).startswith(f"{root}/x.jsonl:3: ") and "\n" not in str(error.value)


def test_bad_lines_are_skipped_counted_and_reported(root, caplog):
    (root / "text.png").write_text("hello")
    good = [chat(f"Q{index}", "A") for index in range(3)]
    bad = [record for record, _ in BAD]
    with caplog.at_level(logging.WARNING):
        got = source(root, good[0], *bad, good[1], good[2], bad_lines="skip")
    assert len(got) == 3 and got.skipped == len(bad)
    assert [got[index].sequences[0][0].text for index in range(3)] == ["Q: Q0 A:", "Q: Q1 A:", "Q: Q2 A:"]
    assert f"{len(bad)} of {len(bad) + 3} lines skipped" in caplog.text and "x.jsonl:2: is not JSON" in caplog.text
    assert len(caplog.records) == 6
    with pytest.raises(DataError, match=f"holds no example; all {len(bad)} lines"):
        source(root, *bad, bad_lines="skip")


def test_not_utf8(root):
    (root / "x.jsonl").write_bytes(b'{"id": "\xff"}\n')
    with pytest.raises(DataError, match=r"x\.jsonl:1: is not UTF-8"):
        JsonLinesSource(root / "x.jsonl", "", PROMPT, ANSWER)


def test_missing_or_empty_file_and_folder(root):
    with pytest.raises(DataError, match=r"none\.jsonl: there is no such file"):
        JsonLinesSource(root / "none.jsonl", "", PROMPT, ANSWER)
    with pytest.raises(DataError, match="holds no example"):
        source(root, "")
    with pytest.raises(DataError, match="image_root"):
        source(root, chat("Q", "A"), image_root=root / "none")


def test_image_root(root):
    assert source(root, chat("Q", "A", image="c.png"), image_root=root / "sub")[0].images == ((str(root / "sub/c.png"),),)


def test_pickles_without_its_records(root):
    got = source(root, *(chat(f"Q{index}", "A" * 1000) for index in range(100)))
    got[0]
    data = pickle.dumps(got)
    again = pickle.loads(data)
    assert len(data) < 5000 and all(again[index] == got[index] for index in range(100))


def test_a_file_changed_on_the_way(root):
    got = source(root, chat("Q", "A"))
    (root / "x.jsonl").write_text("nothing\n")
    with pytest.raises(DataError, match="was changed"):
        got[0]


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_a_list_file(root, indent, end):
    records = [chat(f"Zürich 猫 {index}\n[", "A", image="a.png") for index in range(5)]
    text = json.dumps(records, indent=indent, ensure_ascii=False).replace("\n", end)
    (root / "x.json").write_bytes(b"\xef\xbb\xbf" + text.encode())
    got = JsonLinesSource(root / "x.json", "", PROMPT, ANSWER)
    assert len(got) == 5
    assert [got[index].sequences[0][1].text for index in range(5)] == [f"Q: Zürich 猫 {index}\n[ A:" for index in range(5)]
    text = text.replace('"a.png"', '"none.png"')
    (root / "x.json").write_text(text)
    with pytest.raises(DataError, match=rf"x\.json:{2 if indent else 1}: .*none.png"):
        JsonLinesSource(root / "x.json", "", PROMPT, ANSWER)


def test_a_broken_list_file(root):
    for text, cause in [("{}", r"x\.json:1: expected a list"), ('[\n{"id": 1},\n{"id" 2}]', r"x\.json:3: is not JSON")]:
        (root / "x.json").write_text(text)
        with pytest.raises(DataError, match=cause):
            JsonLinesSource(root / "x.json", "", PROMPT, ANSWER, bad_lines="skip")


def test_bom_and_windows_line_ends(root):
    lines = [json.dumps(chat(f"Q{index}", "A")) for index in range(3)]
    (root / "x.jsonl").write_bytes(b"\xef\xbb\xbf" + "\r\n".join(lines).encode())  # and no line end at the end
    got = JsonLinesSource(root / "x.jsonl", "", PROMPT, ANSWER)
    assert [got[index].sequences[0][0].text for index in range(3)] == ["Q: Q0 A:", "Q: Q1 A:", "Q: Q2 A:"]


def test_a_picture_cut_short_passes_the_first_look_and_is_refused_later(root):
    Image.fromarray(random_pixels(64, 64)).save(root / "cut.png")
    data = (root / "cut.png").read_bytes()
    (root / "cut.png").write_bytes(data[: len(data) // 2])
    assert source(root, chat("Q", "A", image="cut.png"))[0].id.endswith("x.jsonl:1")
