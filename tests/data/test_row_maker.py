"""Sequences and pictures in the places of a row. Axis letters as in vlm_jax/data/rows.py."""

import numpy as np
import pytest
from data_helpers import picture, random_pixels, store_of, tokenised_with

from vlm_jax.config import AugmentConfig
from vlm_jax.data.example import Example
from vlm_jax.data.rows import RowMaker, empty_rows
from vlm_jax.errors import DataError
from vlm_jax.processing.batching import put_media, put_sequence
from vlm_jax.processing.conversation import Medium, Text, assistant, user
from vlm_jax.processing.layout import ENDS, LEARNED, NEWLINE, PROMPT, Layout
from vlm_jax.processing.recipe import RecipeProcessor


def row_of(*, tiles: bool, **changes) -> dict[str, np.ndarray]:
    arrays = empty_rows(tokenised_with(None, tiles=tiles, tokens=12, images=4, **changes)[0], 1)
    return {name: array[0] for name, array in arrays.items()}


def layout(tokens, flags=None, visual=None, last=None, first=None) -> Layout:
    array = lambda values: np.array(values if values is not None else [0] * len(tokens), np.int32)
    return Layout(array(tokens), array(flags).astype(np.uint8), array(visual), array(last), array(first))


def test_sequences_stand_one_after_the_other():
    row = row_of(tiles=False)
    one = layout([5, 3, 6], [PROMPT, PROMPT, LEARNED], last=[0, 1, 1], first=[1, 1, 1])
    two = layout([7, 8, 9], [PROMPT, LEARNED, PROMPT])
    end = put_sequence(row, one, 0, slot=2, segment=1, tile_tokens=0)
    end = put_sequence(row, two, end, slot=3, segment=2, tile_tokens=0)
    end = put_sequence(row, one, end, slot=0, segment=3, tile_tokens=0)
    assert end == 9
    expected = {
        "tokens": [5, 3, 6, 7, 8, 9, 5, 3, 6],
        "positions": [0, 1, 2] * 3,
        "segments": [1, 1, 1, 2, 2, 2, 3, 3, 3],
        "media_last": [0, 3, 3, 0, 0, 0, 0, 1, 1],  # "none" stays none, whatever comes before
        "media_first": [3, 3, 3, 0, 0, 0, 1, 1, 1],
        "prefix_end": [1, 1, 2, 0, 1, 2, 1, 1, 2],  # a prompt ends with its sequence
    }
    assert {name: row[name].tolist() for name in expected} == {name: [*values, 0, 0, 0] for name, values in expected.items()}
    assert "visual" not in row


def test_visual_tokens_are_those_of_their_slots():
    row = row_of(tiles=True)
    one = layout([3, 3, 3, 6], visual=[2, NEWLINE, 1, 0], last=[1] * 4, first=[1] * 4)
    put_sequence(row, one, 1, slot=3, segment=1, tile_tokens=2)
    assert row["visual"].tolist() == [0, 8, 9, 7, 0] + [0] * 7  # a row has four slots of two, then its newline


def test_a_tile_takes_a_slot_and_a_film_takes_one():
    tiles = [np.full((8, 8, 3), value, np.uint8) for value in (1, 2, 3)]
    row = row_of(tiles=True)
    assert put_media(row, [tiles[:2], tiles[2:]], slot=1, in_sequence=True) == 3
    assert row["frames"].tolist() == [0, 1, 1, 1] and row["images"][:, 0, 0, 0, 0].tolist() == [0, 1, 2, 3]
    row = row_of(tiles=False, frames=3)
    assert put_media(row, [tiles[:2], tiles[2:]], slot=1, in_sequence=False) == 2
    assert row["frames"].tolist() == [0, 2, 1, 0] and row["images"][1, :, 0, 0, 0].tolist() == [1, 2, 0]


def test_tiles_that_differ_in_size():
    row = row_of(tiles=True, keep_shapes=True)
    put_media(row, [[np.full((8, 6, 3), 1, np.uint8)], [np.full((2, 8, 3), 2, np.uint8)]], slot=0, in_sequence=True)
    assert row["sizes"][:, 0].tolist() == [[8, 6], [2, 8], [0, 0], [0, 0]]
    assert row["images"][0, 0].sum() == 8 * 6 * 3 and row["images"][1, 0].sum() == 2 * 8 * 3 * 2
    with pytest.raises(ValueError, match="a tile of 9x8 pixels, and a slot has 8x8"):
        put_media(row, [[np.zeros((9, 8, 3), np.uint8)]], slot=0, in_sequence=True)


class Listed(list):
    fingerprint = "listed"


def filled(examples, units, tmp_path, *, tiles=False, number=0, seed=None, **changes):
    """One row of these units, and what made it."""
    changes = {"tokens": 150, "cache_dir": str(tmp_path)} | changes
    examples = Listed(examples)
    store = store_of(examples, tiles=tiles, **changes)
    data, processor = tokenised_with(None, tiles=tiles, **changes)
    arrays = empty_rows(data, 1)
    maker = RowMaker(data, store, examples, processor.spread, seed)
    maker.fill(arrays, 0, [np.array(unit) for unit in units], number)
    return {name: array[0] for name, array in arrays.items()}, processor


def test_tiles_of_several_examples_in_a_row(tmp_path):
    """Every visual token names the slot that holds its own tile, though examples share the row and conversations pictures."""
    heights = [8, 24, 16]
    pixels = [np.full((height, 8, 3), 10 * number + 10, np.uint8) for number, height in enumerate(heights)]
    both = Example("1", ((pixels[1],), (pixels[2],)), tuple(
        (user(*map(Medium, some), Text("q")), assistant("a")) for some in [(0, 1), (1,), ()]
    ))  # fmt: skip
    alone = Example("0", ((pixels[0],),), ((user(Medium(0), Text("q")), assistant("a")),))
    row, processor = filled([alone, both], [[1, 2, 3], [0]], tmp_path, tiles=True, images=6)
    assert row["images"][:, 0, 0, 0, 0].tolist() == [20, 20, 20, 30, 30, 10] and row["frames"].tolist() == [1] * 6
    visual = [row["visual"][row["segments"] == segment] for segment in range(1, 5)]
    seen = [[(number - 1) // 2 for number in one[one > 0]] for one in visual]
    assert seen == [[0, 0, 1, 1, 2, 2, 3, 3, 4, 4], [3, 3, 4, 4], [], [5, 5]]
    assert ((row["tokens"] == processor.spread.image_id) == (row["visual"] > 0)).all()
    assert ((row["weights"] > 0).sum(), (row["targets"] == processor.spread.end_id).sum()) == (4 * 3, 4)


@pytest.mark.parametrize("tiles", [False, True])
def test_pictures_of_dropped_turns_are_not_in_the_row(tmp_path, tiles):
    media = tuple((np.full((8, 8, 3), value, np.uint8),) for value in (10, 20))
    said = tuple(turn for place in range(2) for turn in (user(Medium(place), Text("q")), assistant("a")))
    row, _ = filled([Example("0", media, (said,))], [[0]], tmp_path, tiles=tiles, tokens=30, too_long="drop_turns")
    assert row["images"][:, 0, 0, 0, 0].tolist() == [10, 0, 0, 0] and row["frames"].tolist() == [1, 0, 0, 0]


def test_an_answer_without_an_end_token_is_ended(tmp_path, monkeypatch):
    """A template wrote none behind the third token: what is learned there comes through the store into the row."""
    write = RecipeProcessor.write

    def without(processor, conversation, **options):
        written = write(processor, conversation, **options)
        written.flags[2] |= ENDS
        return written

    monkeypatch.setattr(RecipeProcessor, "write", without)
    examples = [Example("0", (), ((user(Text("q")), assistant("a")),))]
    row, processor = filled(examples, [[0], [0]], tmp_path, tokens=60)
    ends = np.flatnonzero(row["targets"] == processor.spread.end_id)
    length = (row["segments"] == 1).sum()
    assert ends.tolist() == [2, length - 1, length + 2, 2 * length - 1] and (row["weights"][ends] == 1).all()


def test_a_film_is_changed_alike(tmp_path):
    frames = [random_pixels(8, 8), random_pixels(8, 8)]
    examples = [Example("0", (tuple(frames),), ((user(Medium(0), Text("q")), assistant("a")),))]
    changed = AugmentConfig(flip=True, shift=2, colour=0.2)
    rows = [filled(examples, [[0]], tmp_path, number=n, seed=1, augment=changed)[0] for n in range(4)]
    for row in rows:
        assert (row["images"][0, 0] == row["images"][0, 1]).all() and row["frames"][0] == 2
    assert len({row["images"].tobytes() for row in rows}) == 4


def test_a_picture_that_changed_its_size_is_named(tmp_path):
    picture(tmp_path / "a.png", size=(8, 4))
    examples = [Example("x.jsonl:7", ((str(tmp_path / "a.png"),),), ((user(Medium(0), Text("q")), assistant("a")),))]
    filled(examples, [[0]], tmp_path / "cache")
    picture(tmp_path / "a.png", size=(4, 8))
    cause = r"^x\.jsonl:7: picture .*a\.png was changed since it was tokenised: delete (.*), which is made anew"
    with pytest.raises(DataError, match=cause) as error:
        filled(examples, [[0]], tmp_path / "cache")
    assert str(next((tmp_path / "cache").glob("*/meta.json")).parent) in str(error.value)


def test_a_tile_too_large_names_its_example(tmp_path):
    examples = [Example("x.jsonl:7", ((np.zeros((8, 9, 3), np.uint8),),), ((user(Medium(0), Text("q")), assistant("a")),))]
    with pytest.raises(DataError, match=r"x\.jsonl:7: a tile of 8x9 pixels, and a slot has 8x8: data\.image_size"):
        filled(examples, [[0]], tmp_path, tiles=True)
