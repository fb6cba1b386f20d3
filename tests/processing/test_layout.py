"""Visual tokens in their places, what each token sees and what is predicted at it; axis letters as in the module."""

import numpy as np
import pytest

from vlm_jax.processing.layout import (
    ENDS,
    LEARNED,
    NEWLINE,
    PROMPT,
    Layout,
    TokenizedConversation,
    prefix_ends,
    spread,
    targets_of,
    visible,
)

IMAGE, END, RESET = 3, 2, 4


def written(*tokens: int, flags: list[int] | None = None) -> TokenizedConversation:
    return TokenizedConversation(np.array(tokens, np.int32), np.array(flags or [PROMPT] * len(tokens), np.uint8))


def last_seen(tokens: list[int], resets_at: int | None = None) -> list[int]:
    tokens = np.array(tokens)
    is_image = tokens == IMAGE
    last, first = visible(tokens, is_image, int(is_image.sum()), resets_at)
    assert first.tolist() == [int(is_image.any())] * len(tokens)
    assert last.dtype == first.dtype == np.int32
    return last.tolist()


def test_the_table_of_the_literature():
    assert last_seen([9, 9, IMAGE, 9, 9, IMAGE, 9, 9]) == [0, 0, 1, 1, 1, 2, 2, 2]


def test_text_alone_sees_nothing():
    assert last_seen([9, 9]) == [0, 0] and last_seen([]) == []


def test_an_end_token_hides_the_media_before_it_until_the_next_one():
    # IDEFICS: the end token itself still sees, and so does all that follows the next picture.
    tokens = [9, RESET, IMAGE, 9, RESET, 9, RESET, 9, IMAGE, IMAGE, 9, RESET]
    assert last_seen(tokens, RESET) == [0, 0, 1, 1, 1, 0, 0, 0, 2, 3, 3, 3]
    assert last_seen(tokens) == [0, 0, 1, 1, 1, 1, 1, 1, 2, 3, 3, 3]


def test_under_cross_attention_a_medium_stays_one_token():
    text = written(1, IMAGE, 7, IMAGE, 8)
    got = spread(text, image_id=IMAGE, runs=[(np.arange(1),)] * 2, tiles=[1, 1], tile_tokens=0)
    assert got.tokens.tolist() == text.tokens.tolist() and got.flags.tolist() == text.flags.tolist()
    assert got.visual.tolist() == [0] * 5 and got.media_last.tolist() == [0, 1, 1, 2, 2]


def test_visual_tokens_take_the_place_of_their_picture():
    text = written(1, IMAGE, 7, IMAGE, 8, flags=[PROMPT, PROMPT, PROMPT, PROMPT, LEARNED])
    got = spread(text, image_id=IMAGE, runs=[(np.arange(3),), (np.arange(3),)], tiles=[1, 1], tile_tokens=3)
    assert got.tokens.tolist() == [1, *[IMAGE] * 3, 7, *[IMAGE] * 3, 8]
    assert got.visual.tolist() == [0, 1, 2, 3, 0, 4, 5, 6, 0]
    assert got.media_last.tolist() == [0, 1, 1, 1, 1, 2, 2, 2, 2] and got.media_first.tolist() == [1] * 9
    assert got.learned.tolist() == [False] * 8 + [True] and got.prefix.tolist() == [True] * 8 + [False]
    assert {array.dtype.name for array in (got.tokens, got.visual, got.media_last, got.media_first)} == {"int32"}


def test_a_picture_of_several_tiles_and_of_several_runs():
    """LLaVA-NeXT has one run with newlines, IDEFICS2 a run for each tile; tiles are counted on through the conversation."""
    grid = np.array([4, 5, 0, 1, NEWLINE, 2, 3, NEWLINE])  # of three tiles of two tokens
    runs = [(grid,), (np.arange(2), np.arange(2, 4)), (np.arange(2),)]
    text = written(IMAGE, 7, IMAGE, 8, IMAGE, IMAGE)
    got = spread(text, image_id=IMAGE, runs=runs, tiles=[3, 2, 1], tile_tokens=2)
    assert got.visual.tolist() == [5, 6, 1, 2, NEWLINE, 3, 4, NEWLINE, 0, 7, 8, 0, 9, 10, 11, 12]
    assert (got.tokens == IMAGE).tolist() == [visual != 0 for visual in got.visual]


def test_without_pictures_nothing_is_spread():
    got = spread(written(1, 7, 8), image_id=IMAGE, runs=[], tiles=[], tile_tokens=4)
    assert got.tokens.tolist() == [1, 7, 8] and not got.visual.any() and not got.media_first.any()


def test_a_prompt_is_a_block_and_an_answer_is_causal():
    # Two sequences of two turns each, as they stand in a row: the second begins where the first has not ended a prompt.
    first, second = [1, 1, 1, 0, 0, 1, 1, 0, 1, 1], [1, 1, 0, 1, 0, 0]
    flags = np.array([PROMPT if one else LEARNED for one in first + second], np.uint8)
    positions = np.array([*range(10), *range(6)], np.int32)
    got = prefix_ends(flags, positions)
    assert got.tolist() == [2, 2, 2, 3, 4, 6, 6, 7, 9, 9, *[1, 1, 2, 3, 4, 5]]
    assert got.dtype == np.int32


@pytest.mark.parametrize(("prompt", "expected"), [([], []), ([1], [0]), ([0], [0]), ([1, 1], [1, 1]), ([0, 0, 1], [0, 1, 2])])
def test_the_edges_of_a_prefix(prompt, expected):
    flags = np.array(prompt, np.uint8) * PROMPT
    assert prefix_ends(flags, np.arange(len(prompt), dtype=np.int32)).tolist() == expected


def test_a_prompt_ends_where_an_empty_answer_is_learned():
    # The token that has to predict the end does not see the next question.
    flags = np.array([PROMPT, PROMPT + ENDS, PROMPT, PROMPT], np.uint8)
    assert prefix_ends(flags, np.arange(4, dtype=np.int32)).tolist() == [1, 1, 3, 3]


def layout_of(tokens: list[int], flags: list[int]) -> Layout:
    zero = np.zeros(len(tokens), np.int32)
    return Layout(np.array(tokens, np.int32), np.array(flags, np.uint8), zero, zero, zero)


def test_the_next_token_is_predicted_where_it_is_learned():
    targets, weights = targets_of(layout_of([1, 5, 6, 7, END], [PROMPT, PROMPT, LEARNED, LEARNED, LEARNED]), END)
    assert targets.tolist() == [5, 6, 7, END] and weights.tolist() == [0, 1, 1, 1]
    assert targets.dtype == np.int32 and weights.dtype == np.float32


def test_an_answer_ends_although_the_text_goes_on_without_an_end():
    # Q A \n Q A </s>: the line break is what the template writes, and not what the model says.
    flags = [PROMPT, LEARNED, LEARNED | ENDS, PROMPT, PROMPT, LEARNED, LEARNED]
    targets, weights = targets_of(layout_of([1, 5, 6, 10, 7, 8, END], flags), END)
    assert targets.tolist() == [5, 6, END, 7, 8, END]
    assert weights.tolist() == [1, 1, 1, 0, 1, 1]


def test_the_last_token_is_only_a_target():
    whole = layout_of([1, 5, END], [PROMPT, LEARNED, LEARNED])
    assert whole.without_last().tokens.tolist() == [1, 5] and whole.without_last().flags.tolist() == [PROMPT, LEARNED]
