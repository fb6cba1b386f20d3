"""Lines of the user's own data -> examples. The store's tests have what is looked at later: pictures and lengths."""

import json
import logging
import os
import pickle

import pytest
from data_helpers import chat, opened, picture, store_of, text_of, write_lines

from vlm_jax.config import DataConfig, JsonLinesConfig
from vlm_jax.data.example import Example
from vlm_jax.data.sources import jsonl
from vlm_jax.data.sources.jsonl import JsonLinesSource
from vlm_jax.errors import DataError
from vlm_jax.processing.conversation import Medium, Text, Turn, assistant, user
from vlm_jax.processing.recipe import joined, rendered

DATA = DataConfig(
    source=JsonLinesConfig(train="", eval=""),
    prompt="Q: {question} A:",
    answer=" {answer}",
    image_size=8,
    rows=1,
    tokens=8,
    images=1,
)


@pytest.fixture
def root(tmp_path):
    for name in ("a.png", "b.png"):
        picture(tmp_path / name)
    (tmp_path / "sub").mkdir()
    picture(tmp_path / "sub/c.png")
    return tmp_path


def source(root, *records, image_root="") -> JsonLinesSource:
    return opened(write_lines(root / "x.jsonl", list(records)), image_root)


def messages(*parts) -> dict:
    content = [*parts, {"type": "text", "text": "Q"}]
    return {"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": "A"}]}


def names_of(root, example: Example) -> tuple:
    return tuple(tuple(frame.split(str(root) + "/")[1] for frame in medium) for medium in example.media)


def one(root, record) -> tuple:
    """The pictures of a record, and its pieces as the recipe has them: text or a picture's place, and whether it is learned."""
    example = source(root, record)[0]
    assert len(example.conversations) == 1
    return names_of(root, example), tuple(joined(rendered(example.conversations[0], DATA)))


def test_pictures_under_images(root):
    """As questions have them; a chat's parts without a path take them in their order."""
    assert one(root, chat("<image> or <image>?", "A", images=["a.png", "b.png"]))[0] == (("a.png",), ("b.png",))
    beside = messages({"type": "image"}, {"type": "text", "text": "and"}, {"type": "image"}) | {"images": ["b.png", "a.png"]}
    assert one(root, beside)[0] == (("b.png",), ("a.png",))
    assert one(root, chat("Q", "A") | {"images": [], "image_id": 3})[0] == ()


@pytest.mark.usefixtures("within_a_minute")
def test_what_is_no_regular_file_is_not_read(root):
    os.mkfifo(root / "fifo.png")
    os.mkfifo(root / "fifo.jsonl")
    with pytest.raises(DataError, match=r"x\.jsonl:1: picture .*fifo\.png: is not a regular file"):
        store_of(source(root, chat("Q", "A", image="fifo.png")))
    with pytest.raises(DataError, match=r"fifo\.jsonl: is not a regular file"):
        opened(root / "fifo.jsonl")


def question(example: Example) -> str:
    return example.conversations[0][0].text


@pytest.mark.parametrize("value", ["<image>\nWhat?", "What?\n<image>", "What?", " <image>What?", "<image> What? "])
def test_conversation_with_one_picture(root, value):
    images, parts = one(root, chat(value, "A cat. ", image="a.png"))
    assert images == (("a.png",),)
    assert parts == ((Medium(0), False), ("Q: What? A:", False), (" A cat.", True))


def test_conversation_of_several_turns_and_pictures(root):
    record = chat("<image>\n<image>\nSame?", "No.", "And <image> or <image>?", "{answer}", image=["a.png", "b.png"] * 2)
    images, parts = one(root, record)
    assert images == (("a.png",), ("b.png",)) * 2
    assert parts == (
        (Medium(0), False),
        (Medium(1), False),
        ("Q: Same? A:", False),
        (" No.", True),
        ("Q: And ", False),
        (Medium(2), False),
        (" or ", False),
        (Medium(3), False),
        ("? A:", False),
        (" {answer}", True),
    )


def test_pictures_without_a_marker_stand_first(root):
    images, parts = one(root, chat("{question}?", "No.", image=["a.png", "sub/c.png"]))
    assert images == (("a.png",), ("sub/c.png",))
    assert parts == ((Medium(0), False), (Medium(1), False), ("Q: {question}? A:", False), (" No.", True))


def test_conversation_without_a_picture(root):
    assert one(root, chat("Hi", "Ho"))[1] == (("Q: Hi A:", False), (" Ho", True))


def test_interleaved(root):
    content = [{"image": "a.png"}, {"text": "My <image>."}, {"frames": ["a.png", "b.png"]}, {"text": "Q", "learn": False}]
    images, parts = one(root, {"content": content})
    assert images == (("a.png",), ("a.png", "b.png"))
    assert parts == ((Medium(0), False), ("My <image>.", True), (Medium(1), False), ("Q", False))


BAD = [
    ("{", "is not JSON: Expecting property name"),
    ('{"a": 1} x', "is not JSON: Extra data at column 10"),
    ("[" * 100_000, "is nested too deeply"),
    ('{"id": ' + "1" * 5_000 + "}", "has a number of more than 4,300 digits"),
    ("3", "is 3; expected an object"),
    ({"id": "1"}, r"has the keys \['id'\]; expected one of 'conversations', 'messages', 'content'"),
    (chat("Q", "A") | {"content": []}, r"has the keys \['content', 'conversations', 'id'\]; expected one of"),
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
    (chat("Q", "A", image="a.png") | {"images": ["a.png"]}, "has 'image' and 'images'; expected one of them"),
    (chat("Q", "A") | {"video": "a.mp4"}, "video .*a.mp4: there is no such file"),
    (chat("Q", "A", image="a.png") | {"video": "a.mp4"}, "has 'video' beside 'videos' or pictures; expected one of them"),
    (messages() | {"video": "a.mp4"}, "has the key 'video', which is not read; expected its pictures in 'image'"),
    ({"conversations": [{"from": "human", "value": "Q", "image": "a.png"}]}, "has a turn with the key 'image', which is not"),
    ({"messages": [{"role": "user", "content": "Q", "images": ["a.png"]}]}, "has a turn with the key 'images'"),
    (messages({"type": "text", "text": "Q", "image": "a.png"}), "has a text with the key 'image'"),
    (chat("Q", "A") | {"image_0": "a.png"}, "has the key 'image_0', which is not read"),
    (chat("Q", "A") | {"pics": ["a.png"]}, "has the key 'pics', which is not read"),
    (chat("Q", "A") | {"image_path": "a.png"}, "has the key 'image_path', which is not read"),
    ({"content": [{"text": "a"}], "images": ["a.png"]}, "has the key 'images', .* expected its pictures in parts of 'content'"),
    (messages({"image": "a.png"}) | {"images": ["a.png"]}, "0 parts of type 'image' without a path, and 1 pictures"),
    ({"content": [{"text": "a", "lern": False}]}, "part 1 has the unknown key 'lern'"),
    ({"content": [{"text": "a"}, {"image": "a.png", "text": "b"}]}, "part 2 is .*; expected 'text'"),
    ({"content": [{"image": "a.png", "learn": True}]}, "part 1 is"),
    ({"content": [{"text": "a", "learn": 1}]}, "'learn' is 1; expected true or false"),
    ({"content": [{"text": 3}]}, "'text' is 3; expected a string"),
    ({"content": [{"frames": "a.png"}, {"text": "a"}]}, "'frames' is \"a.png\"; expected a list"),
    ({"content": [{"frames": []}, {"text": "a"}]}, "'frames' is empty"),
    ({"content": ["a"]}, 'part 1 is "a"; expected an object'),
    ({"content": [{"text": "a", "learn": False}]}, "nothing to learn"),
    ({"messages": []}, r"messages: expected a list of messages, found \[\]"),
    ({"messages": "Q"}, "'messages' is \"Q\"; expected a list"),
    ({"messages": [{"role": "user"}]}, "message 1 is .*; expected an object with 'role' and 'content'"),
    ({"messages": [{"role": "human", "content": "Q"}]}, "message 1 has the role 'human'; expected 'system', 'user' or"),
    ({"messages": [{"role": "user", "content": 3}]}, "message 1: 'content' is 3; expected a string or a list"),
    ({"messages": [{"role": "user", "content": [{"type": "audio"}]}]}, "message 1, part 1 is .*; expected 'type': 'text'"),
    ({"messages": [{"role": "user", "content": "Q\udc00"}]}, "message 1, part 1: 'text' has half of a surrogate pair"),
    ({"messages": [{"role": "user", "content": "Q"}]}, "nothing to learn"),
    (messages({"image": "../a.png"}), "is outside of"),
    (messages({"image": "none.png"}), "none.png: there is no such file"),
    (messages({"image": 3}), "message 1, part 1: a picture is 3; expected a file's path"),
    (messages({"type": "image"}), "message 1, part 1 has no picture"),
    (messages({"image_url": {"url": "https://x.y/z.png"}}), "fetch the picture first"),
    (messages({"type": "video", "frames": []}), "message 1, part 1 is .*; expected 'type'"),
    ({"conversations": [{"from": "human", "value": "Q"}, {"from": "system", "value": "S"}]}, "turn 2 is from 'system'"),
    ({"conversations": [{"from": "system", "value": "S"}]}, "nothing to learn"),
    ({"conversations": [{"from": "system", "value": "S"}, {"from": "gpt", "value": "A"}]}, "turn 2 is from 'gpt'"),
]


@pytest.mark.parametrize(("record", "cause"), BAD, ids=range(len(BAD)))
def test_a_bad_line_is_named(root, record, cause):
    (root / "text.png").write_text("hello")
    with pytest.raises(DataError, match=cause) as error:
        store_of(source(root, chat("Q", "A"), "", record))
    assert str(error.value).startswith(f"{root}/x.jsonl:3: ") and "\n" not in str(error.value)


def test_bad_lines_are_skipped_counted_and_reported(root, caplog):
    (root / "text.png").write_text("hello")
    good = [chat(f"Q{index}", "A") for index in range(3)]
    bad = [record for record, _ in BAD]
    with caplog.at_level(logging.WARNING):
        store = store_of(source(root, good[0], *bad, good[1], good[2]), skip=True)
    assert len(store) == 3 and store.meta["problems"] == len(bad)
    assert ["Q0" in text_of(store, 0), "Q1" in text_of(store, 1), "Q2" in text_of(store, 2)] == [True] * 3
    assert store.example.tolist() == [0, len(bad) + 1, len(bad) + 2]
    assert f"{len(bad)} of {len(bad) + 3} examples are left out" in caplog.text and "x.jsonl:2: is not JSON" in caplog.text
    assert len(caplog.records) == 7 and f"once they are mended, delete {store.folder}" in caplog.text
    with pytest.raises(DataError, match=rf"none of the {len(bad)} examples can be trained on; the first: .*x\.jsonl:1: is not"):
        store_of(source(root, *bad), skip=True)


def test_not_utf8(root):
    (root / "x.jsonl").write_bytes(b'{"id": "\xff"}\n')
    with pytest.raises(DataError, match=r"x\.jsonl:1: is not UTF-8"):
        opened(root / "x.jsonl")[0]
    (root / "x.json").write_bytes(b'[{"id": "\xff"}]\n')
    with pytest.raises(DataError, match=r"x\.json: is not UTF-8"):
        opened(root / "x.json")


def test_missing_or_empty_file_and_folder(root):
    with pytest.raises(DataError, match=r"none\.jsonl: there is no such file"):
        opened(root / "none.jsonl")
    with pytest.raises(DataError, match="holds no example"):
        source(root, "")
    with pytest.raises(DataError, match="image_root"):
        source(root, chat("Q", "A"), image_root=root / "none")


def test_image_root(root):
    assert source(root, chat("Q", "A", image="c.png"), image_root=root / "sub")[0].media == ((str(root / "sub/c.png"),),)


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


def test_bom_and_windows_line_ends(root):
    lines = [json.dumps(chat(f"Q{index}", "A")) for index in range(3)]
    (root / "x.jsonl").write_bytes(b"\xef\xbb\xbf" + "\r\n".join(lines).encode())  # and no line end at the end
    got = opened(root / "x.jsonl")
    assert [question(got[index]) for index in range(3)] == ["Q0", "Q1", "Q2"]


def test_messages(root):
    """The chat list: pictures stand where they are written, what the assistant says is learned."""
    said = [
        {"role": "system", "content": "Be brief."},
        {
            "role": "user",
            "content": [{"type": "image", "image": "a.png"}, {"type": "text", "text": "Same as"}, {"path": "b.png"}],
        },
        {"role": "assistant", "content": [{"type": "text", "text": "No."}]},
        {
            "role": "user",
            "content": [{"type": "video", "frames": ["a.png", "sub/c.png"]}, {"type": "text", "text": "<image>?"}],
        },
        {"role": "assistant", "content": "Yes."},
    ]
    example = source(root, {"messages": said})[0]
    assert names_of(root, example) == (("a.png",), ("b.png",), ("a.png", "sub/c.png"))
    assert example.conversations == (
        (
            Turn("system", (Text("Be brief."),)),
            user(Medium(0), Text("Same as"), Medium(1)),
            assistant("No."),
            user(Medium(2), Text("<image>?")),
            assistant("Yes."),
        ),
    )


def test_a_system_turn_begins_a_conversation(root):
    record = chat("<image>Q", "A", image="a.png")
    record["conversations"].insert(0, {"from": "system", "value": "Be brief."})
    images, parts = one(root, record)
    assert images == (("a.png",),)
    assert parts == (("Be brief.", False), (Medium(0), False), ("Q: Q A:", False), (" A", True))


def test_where_records_begin_is_kept(root, monkeypatch):
    records = [chat(f"Q{index}", "A") for index in range(3)]
    first = source(root, *records)
    with monkeypatch.context() as patched:
        patched.setattr(jsonl, "_line_records", lambda path: pytest.fail("read again"))
        again = opened(root / "x.jsonl")
        assert [again[index] for index in range(3)] == [first[index] for index in range(3)]
    changed = source(root, *records[1:], chat("Q3", "A"))
    assert [question(changed[index]) for index in range(3)] == ["Q1", "Q2", "Q3"]
    # The same bytes are no list where they are called one.
    (root / "x.json").write_bytes((root / "x.jsonl").read_bytes())
    with pytest.raises(DataError, match=r"x\.json:1: expected a list"):
        opened(root / "x.json")


def test_fingerprints_of_sources(root):
    records = [chat("Q", "A", image="c.png")]
    write_lines(root / "sub/x.jsonl", records)
    (root / "copy").mkdir()
    write_lines(root / "copy/x.jsonl", records)
    picture(root / "c.png")
    there = opened(root / "sub/x.jsonl").fingerprint
    assert there == opened(root / "sub/x.jsonl").fingerprint
    others = {
        opened(root / "copy/x.jsonl").fingerprint,  # has other pictures
        opened(root / "sub/x.jsonl", image_root=str(root)).fingerprint,
        opened(write_lines(root / "sub/x.jsonl", [*records, *records])).fingerprint,
    }
    assert len(others | {there}) == 4
