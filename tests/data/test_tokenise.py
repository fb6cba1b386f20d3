"""What is too long, what is left out, and what is counted."""

import dataclasses

import numpy as np
import pytest
from data_helpers import picture, store_of, text_of, tokenised_with, write_lines

from vlm_jax.data import tokenise
from vlm_jax.data.example import Example
from vlm_jax.data.sources.jsonl import JsonLinesSource
from vlm_jax.data.tokenise import DatasetTokenizer
from vlm_jax.errors import DataError
from vlm_jax.processing.conversation import Medium, Text, Turn, assistant, user
from vlm_jax.processing.layout import LEARNED

# A token a byte: `<BOS>` and "Question: q Answer:" of 19, then " aaa" and `<EOC>`; the last is only a target.
ONE_TURN = 1 + 19 + 4
TWO_TURNS = ONE_TURN + 1 + 19 + 4


@pytest.fixture
def root(tmp_path):
    for name, size in [("a.png", (8, 8)), ("b.png", (8, 16)), ("c.png", (8, 24))]:
        picture(tmp_path / name, size=size)
    return tmp_path


def chat(turns: int, image=(), answer="aaa") -> dict:
    said = [{"from": "human", "value": "q"}, {"from": "gpt", "value": answer}] * turns
    return {"image": list(image), "conversations": said}


def with_pictures(*names: str) -> dict:
    """A turn a picture."""
    said = [[{"from": "human", "value": "<image>q"}, {"from": "gpt", "value": "aaa"}] for _ in names]
    return {"image": list(names), "conversations": [turn for pair in said for turn in pair]}


def source(root, *records) -> JsonLinesSource:
    return JsonLinesSource(write_lines(root / "x.jsonl", list(records)), "", cache_dir=root / "cache")


def test_what_is_too_long_names_its_line_and_both_numbers(root):
    records = source(root, chat(1), chat(2))
    assert store_of(records, tokens=TWO_TURNS).lengths.tolist() == [ONE_TURN, TWO_TURNS]
    cause = rf"x\.jsonl:2: a conversation of {TWO_TURNS} tokens, and a row has data\.tokens={TWO_TURNS - 1}\. Raise it"
    with pytest.raises(DataError, match=cause):
        store_of(records, tokens=TWO_TURNS - 1)


def test_last_turns_are_dropped_counted_and_reported(root, caplog):
    store = store_of(source(root, chat(1), chat(4), chat(3), chat(2)), tokens=TWO_TURNS, too_long="drop_turns")
    assert store.lengths.tolist() == [ONE_TURN, TWO_TURNS, TWO_TURNS, TWO_TURNS]
    assert text_of(store, 1) == "<BOS>" + "Question: q Answer: aaa<EOC>" * 2  # whole turns, ended as ever
    assert store.written(1).flags[-1] == LEARNED
    assert store.meta["dropped"] == 4 + 2 and "6 turns are left out of conversations that are too long" in caplog.text
    caplog.clear()
    store_of(source(root, chat(1)), tokens=TWO_TURNS, too_long="drop_turns")
    assert "turns are left out" not in caplog.text


def test_an_answer_goes_with_its_question(root):
    said = [user(Text("q")), assistant("aaa"), user(Text("q")), user(Text("q")), assistant("aaa")]
    made = DatasetTokenizer([example(said)], *tokeniser_args(tokens=TWO_TURNS, too_long="drop_turns"))
    chunk = made.chunk(range(1), skip=False)
    assert chunk.dropped == 3 and chunk.fields["lengths"] == [ONE_TURN]


def test_interleaved_text_is_dropped_from_its_end(root):
    content = [{"text": "a" * 9}, {"image": "a.png"}, {"text": "b" * 9}, {"image": "b.png"}, {"text": "c" * 9}]
    store = store_of(source(root, {"content": content}), tokens=25, too_long="drop_turns")
    assert text_of(store, 0) == "<BOS>aaaaaaaaa<EOC><image>bbbbbbbbb<EOC>" and store.slots.tolist() == [1]


def test_the_first_turn_alone_is_too_long(root):
    records = source(root, chat(3, answer="a" * 99), chat(3))
    cause = r"x\.jsonl:1: a conversation of 120 tokens, and a row has data\.tokens=48\..*the first is too long already"
    with pytest.raises(DataError, match=cause):
        store_of(records, tokens=TWO_TURNS, too_long="drop_turns")
    store = store_of(records, tokens=TWO_TURNS, too_long="drop_turns", skip=True)
    assert len(store) == 1 and store.meta["problems"] == 1
    assert store.meta["dropped"] == 2  # of the conversation that is left; those of the other went with it


def test_pictures_of_dropped_turns_take_no_slot(root):
    store = store_of(source(root, with_pictures("a.png", "b.png", "c.png")), tokens=TWO_TURNS + 2, too_long="drop_turns")
    assert store.slots.tolist() == [2] and store.media.tolist() == [2]
    assert store.media_of(0) == [(8, 8), (16, 8)]


def test_more_pictures_than_a_row_has(root):
    records = source(root, with_pictures("a.png", "b.png", "c.png"))
    with pytest.raises(DataError, match=r"x\.jsonl:1: 3 images, and a row has data\.images=2\. Raise it"):
        store_of(records, images=2)
    store = store_of(source(root, with_pictures("a.png", "b.png", "c.png"), chat(1)), images=2, skip=True)
    assert store.slots.tolist() == store.example_media.tolist() == [0, 0] and store.meta["problems"] == 1
    records = source(root, with_pictures("a.png", "b.png", "c.png"))
    store = store_of(records, images=2, too_long="drop_turns")
    assert store.slots.tolist() == [2] and store.meta["dropped"] == 2 and text_of(store, 0).count("<image>") == 2
    with pytest.raises(DataError, match=r"x\.jsonl:1: 2 images, and a row has data\.images=1\. Raise it"):
        store_of(source(root, chat(2, ["a.png", "b.png"])), images=1, too_long="drop_turns")


def test_tiles_are_counted_where_visual_tokens_stand_in_the_sequence(root):
    """A picture is a tile for each of its rows of 8 pixels, of two visual tokens each."""
    records = source(root, with_pictures("a.png", "c.png"))  # one tile and three
    store = store_of(records, tiles=True, images=4)
    assert store.slots.tolist() == [4] and store.example_media.tolist() == [2]
    assert store.lengths.tolist() == [TWO_TURNS + 8]  # eight visual tokens
    assert len(store.written(0).tokens) == TWO_TURNS + 2 + 1  # of which the store keeps one a picture
    with pytest.raises(DataError, match=r"x\.jsonl:1: 4 tiles of pictures, and a row has data\.images=3\. Raise it"):
        store_of(records, tiles=True, images=3)
    cause = rf"a conversation of {TWO_TURNS + 8} tokens, and a row has data\.tokens={TWO_TURNS + 7}"
    with pytest.raises(DataError, match=cause):
        store_of(records, tiles=True, tokens=TWO_TURNS + 7)
    assert store_of(records, tiles=True, images=3, too_long="drop_turns").slots.tolist() == [1]


def test_frames(root):
    film = [{"frames": ["a.png", "a.png"]}, {"text": "a"}, {"frames": ["a.png", "b.png", "b.png"]}, {"text": "b" * 50}]
    with pytest.raises(DataError, match=r"x\.jsonl:1: an image slot of 3 frames, and a slot has data\.frames=2\. Raise it"):
        store_of(source(root, {"content": film}), frames=2)
    assert store_of(source(root, {"content": film}), frames=3).slots.tolist() == [2]
    assert store_of(source(root, {"content": film}), tokens=20, too_long="drop_turns").slots.tolist() == [1]


def example(said, media=(), name="x.jsonl:3"):
    return Example(name, tuple(media), (tuple(said),) if said else ())


def tokeniser_args(**changes):
    data, processor = tokenised_with(None, **changes)
    return processor, data


@pytest.mark.parametrize("places", [(1, 0), (0, 2), (0, 0)])
def test_images_out_of_order(places):
    pixels = np.zeros((8, 8, 3), np.uint8)
    said = [Turn("text", (Medium(place),)) for place in places] + [Turn("text", (Text("A"),), learn=True)]
    made = DatasetTokenizer([example(said, [(pixels,)] * 3)], *tokeniser_args())
    (problem,) = made.chunk(range(1), skip=True).problems
    assert problem == f"x.jsonl:3: its media are used in the order {list(places)}; expected consecutive ones"


def test_an_example_without_text():
    (problem,) = DatasetTokenizer([example([])], *tokeniser_args()).chunk(range(1), skip=True).problems
    assert problem == "x.jsonl:3: has no text"


def test_an_example_that_is_left_out_leaves_no_trace(root):
    """Of two conversations of which the second is too long, the first is not kept either."""
    short, long = (user(Text("q")), assistant("aaa")), (user(Text("q")), assistant("a" * 99))
    both = dataclasses.replace(example(short), conversations=(short, long))
    made = DatasetTokenizer([both, example(short)], *tokeniser_args(tokens=ONE_TURN))
    chunk = made.chunk(range(2), skip=True)
    assert len(chunk.problems) == 1 and chunk.fields["example"] == [1] and chunk.fields["slots"] == [0, 0]
    stopped = made.chunk(range(2), skip=False)
    assert stopped.problems == chunk.problems and stopped.fields["example"] == []


def test_a_picture_is_looked_at_once(root, monkeypatch):
    looked = []
    size = tokenise.picture_size
    monkeypatch.setattr(tokenise, "picture_size", lambda path: looked.append(path) or size(path))
    store = store_of(source(root, *[chat(1, ["a.png"]), chat(1, ["b.png"])] * 5))
    assert len(looked) == 2 and store.sizes.tolist() == [[8, 8], [16, 8]] * 5
