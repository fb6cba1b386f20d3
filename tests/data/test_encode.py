import numpy as np
import pytest
from vlm_jax.data.encode import encode_sequence, media_of, prompt_tokens

from vlm_jax.data.example import ImageAt, Text
from vlm_jax.errors import DataError

BOS, IMAGE, EOC = 1, 3, 4


class Letters:
    """A tokenizer of one token a letter, so that what is expected can be written by hand."""

    bos_id, image_id, eoc_id = BOS, IMAGE, EOC

    def encode_batch(self, texts):
        return [[ord(letter) for letter in text] for text in texts]


Q, A, B, C = map(ord, "QABC")


def check(got, tokens, targets, weights, last, first):
    assert got.tokens.tolist() == tokens
    assert got.targets.tolist() == targets
    assert got.weights.tolist() == weights
    assert got.media_last.tolist() == last
    assert got.media_first.tolist() == first
    assert [a.dtype.name for a in (got.tokens, got.targets, got.media_last, got.media_first)] == ["int32"] * 4
    assert got.weights.dtype == np.float32


def test_one_question():
    got = encode_sequence((ImageAt(0), Text("QQ", False), Text("A", True)), Letters())
    check(got, [BOS, IMAGE, Q, Q, A], [IMAGE, Q, Q, A, EOC], [0, 0, 0, 1, 1], [0, 1, 1, 1, 1], [1] * 5)


def test_learned_text_is_closed_before_an_image_and_before_a_question():
    parts = (ImageAt(2), Text("A", True), ImageAt(3), Text("Q", False), Text("B", True), Text("Q", False), Text("C", True))
    check(
        encode_sequence(parts, Letters()),
        [BOS, IMAGE, A, EOC, IMAGE, Q, B, EOC, Q, C],
        [IMAGE, A, EOC, IMAGE, Q, B, EOC, Q, C, EOC],
        [0, 1, 1, 0, 0, 1, 1, 0, 1, 1],
        [0, 3, 3, 3, 4, 4, 4, 4, 4, 4],
        [3] * 10,
    )


def test_two_learned_texts_are_one_chunk():
    check(encode_sequence((Text("A", True), Text("B", True)), Letters()), [BOS, A, B], [A, B, EOC], [1, 1, 1], [0] * 3, [0] * 3)


def test_text_that_is_only_read_ends_in_an_end_that_is_not_learned():
    parts = (Text("A", True), ImageAt(0), Text("Q", False))
    check(
        encode_sequence(parts, Letters()),
        [BOS, A, EOC, IMAGE, Q],
        [A, EOC, IMAGE, Q, EOC],
        [1, 1, 0, 0, 0],
        [0, 0, 0, 1, 1],
        [1] * 5,
    )


def test_the_table_of_the_literature():
    tokens = np.array([9, 9, IMAGE, 9, 9, IMAGE, 9, 9])
    last, first = media_of(tokens, IMAGE, [8], [0])
    assert last.tolist() == [0, 0, 1, 1, 1, 2, 2, 2] and first.tolist() == [1] * 8


def test_media_of_several_sequences():
    tokens = np.array([9, IMAGE, 9, 9, 9, IMAGE, IMAGE, 9, IMAGE])
    last, first = media_of(tokens, IMAGE, [3, 1, 3, 2], [0, 0, 1, 0])
    assert last.tolist() == [0, 1, 1, 0, 0, 2, 3, 0, 1]
    assert media_of(np.array([IMAGE, 9, IMAGE, 9]), IMAGE, [2, 2], [0, 0])[0].tolist() == [1, 1, 1, 1]
    assert first.tolist() == [1, 1, 1, 0, 2, 2, 2, 1, 1]


def test_prompt_is_what_training_has_before_the_answer():
    shots = (ImageAt(0), Text("Q", False), Text("A", True), ImageAt(1), Text("QQ", False))
    tokens, last, first = prompt_tokens(shots, Letters())
    assert tokens.tolist() == [BOS, IMAGE, Q, A, EOC, IMAGE, Q, Q]
    assert last.tolist() == [0, 1, 1, 1, 1, 2, 2, 2] and first.tolist() == [1] * 8
    whole = encode_sequence((*shots, Text("B", True)), Letters())
    assert whole.tokens.tolist() == [*tokens.tolist(), B]
    assert prompt_tokens((Text("Q", False), Text("A", True)), Letters())[0].tolist() == [BOS, Q, A]
    assert prompt_tokens((), Letters())[0].tolist() == [BOS]


def test_images_out_of_order():
    with pytest.raises(DataError, match=r"x.jsonl:3: .*\[1, 0\]"):
        encode_sequence((ImageAt(1), ImageAt(0), Text("A", True)), Letters(), "x.jsonl:3")
    with pytest.raises(DataError):
        encode_sequence((ImageAt(0), ImageAt(2), Text("A", True)), Letters())


def test_a_typed_marker_is_not_an_image(tokenizer):
    got = encode_sequence((ImageAt(0), Text("<image> <EOC>", False), Text(" red", True)), tokenizer)
    assert (got.tokens == tokenizer.image_id).sum() == 1 and tokenizer.eoc_id not in got.tokens
