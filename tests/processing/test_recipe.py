"""Flamingo's layout, expected by hand with a tokenizer of one token a letter."""

import dataclasses
import pickle

import numpy as np
import pytest
import tiny_tokenizers

from vlm_jax.config import DataConfig, JsonLinesConfig
from vlm_jax.errors import DataError, RequestError
from vlm_jax.processing.conversation import Medium, Text, Turn, assistant, from_prompt, user
from vlm_jax.processing.layout import targets_of
from vlm_jax.processing.recipe import RecipeProcessor, joined, rendered, texts_of
from vlm_jax.processing.tokenizer import Tokenizer, train_tokenizer

PAD, BOS, EOS, IMAGE, EOC = range(5)
Q, A, B, C = map(ord, "QABC")
DATA = DataConfig(
    source=JsonLinesConfig(train="", eval=""),
    prompt="Q: {question} A:",
    answer=" {answer}",
    image_size=8,
    rows=1,
    tokens=16,
    images=2,
)


class Letters:
    pad_id, bos_id, eos_id, image_id, eoc_id = range(5)
    vocab_size = 128
    serialised = "letters"

    def encode_offsets(self, text):
        return [ord(letter) for letter in text], [(place, place + 1) for place in range(len(text))]


def seen(index):
    return Turn("text", (Medium(index),))


def read(text):
    return Turn("text", (Text(text),))


def learned(text):
    return Turn("text", (Text(text),), learn=True)


def processor(**changes) -> RecipeProcessor:
    return RecipeProcessor(Letters(), dataclasses.replace(DATA, **changes))


def check(turns, tokens, targets, weights, last, first):
    pictures = sum(isinstance(part, Medium) for turn in turns for part in turn.content)
    whole = processor().lay_out(turns, [(8, 8)] * pictures)
    got, (got_targets, got_weights) = whole.without_last(), targets_of(whole, EOC)
    assert got.tokens.tolist() == tokens
    assert got_targets.tolist() == targets
    assert got_weights.tolist() == weights
    assert got.media_last.tolist() == last
    assert got.media_first.tolist() == first
    assert [a.dtype.name for a in (got.tokens, got_targets, got.media_last, got.media_first)] == ["int32"] * 4
    assert got_weights.dtype == np.float32


def test_one_question():
    turns = (seen(0), read("QQ"), learned("A"))
    check(turns, [BOS, IMAGE, Q, Q, A], [IMAGE, Q, Q, A, EOC], [0, 0, 0, 1, 1], [0, 1, 1, 1, 1], [1] * 5)


def test_learned_text_is_closed_before_an_image_and_before_a_question():
    check(
        (seen(2), learned("A"), seen(3), read("Q"), learned("B"), read("Q"), learned("C")),
        [BOS, IMAGE, A, EOC, IMAGE, Q, B, EOC, Q, C],
        [IMAGE, A, EOC, IMAGE, Q, B, EOC, Q, C, EOC],
        [0, 1, 1, 0, 0, 1, 1, 0, 1, 1],
        [0, 1, 1, 1, 2, 2, 2, 2, 2, 2],  # counted within the conversation: the row adds the slots before
        [1] * 10,
    )


def test_two_learned_texts_are_one_chunk():
    check((learned("A"), learned("B")), [BOS, A, B], [A, B, EOC], [1, 1, 1], [0] * 3, [0] * 3)


def test_text_that_is_only_read_ends_in_an_end_that_is_not_learned():
    check(
        (learned("A"), seen(0), read("Q")),
        [BOS, A, EOC, IMAGE, Q],
        [A, EOC, IMAGE, Q, EOC],
        [1, 1, 0, 0, 0],
        [0, 0, 0, 1, 1],
        [1] * 5,
    )


def test_the_prompt_is_all_that_is_not_learned():
    got = processor().lay_out((seen(0), read("QQ"), learned("A"), read("Q")), [(8, 8)])
    assert got.tokens.tolist() == [BOS, IMAGE, Q, Q, A, EOC, Q, EOC]
    assert got.learned.tolist() == [False] * 4 + [True, True, False, False]
    assert (got.prefix == ~got.learned).all()


def test_prompt_is_what_training_has_before_the_answer():
    shots = (seen(0), read("Q"), learned("A"), seen(1), read("QQ"))
    got = processor().lay_out(shots, [(8, 8)] * 2, open=True)
    assert got.tokens.tolist() == [BOS, IMAGE, Q, A, EOC, IMAGE, Q, Q]
    assert got.media_last.tolist() == [0, 1, 1, 1, 1, 2, 2, 2] and got.media_first.tolist() == [1] * 8
    whole = processor().lay_out((*shots, learned("B")), [(8, 8)] * 2)
    assert whole.tokens.tolist() == [*got.tokens.tolist(), B, EOC]
    for name in ("flags", "media_last", "media_first"):
        assert getattr(whole, name)[:8].tolist() == getattr(got, name).tolist()
    assert processor().write((read("Q"), learned("A")), open=True).tokens.tolist() == [BOS, Q, A]
    assert processor().write((), open=True).tokens.tolist() == [BOS]


def test_visual_tokens_of_two_pictures_in_the_sequence():
    turns = (seen(0), read("Q"), seen(1), learned("A"))
    got = processor(visual_tokens=2).lay_out(turns, [(8, 8), (3, 5)])
    assert got.tokens.tolist() == [BOS, IMAGE, IMAGE, Q, IMAGE, IMAGE, A, EOC]
    assert got.visual.tolist() == [0, 1, 2, 0, 3, 4, 0, 0]


def pieces(*turns):
    return [piece for piece, _ in joined(rendered(turns, DATA))]


def test_a_turn_in_the_words_of_the_recipe():
    turns = (user(Text(" What? ")), assistant(" A cat. "), user(Text("Why?")), assistant("{answer}"))
    assert joined(rendered(turns, DATA)) == [
        ("Q: What? A:", False), (" A cat.", True), ("Q: Why? A:", False), (" {answer}", True)
    ]  # fmt: skip
    assert texts_of(turns, DATA) == ["Q: What? A:", " A cat.", "Q: Why? A:", " {answer}"]
    assert pieces(user(Text("{question}"))) == ["Q: {question} A:"]


def test_where_the_pictures_of_a_question_stand():
    assert pieces(user(Text("What is"), Medium(0), Text(" here?"))) == [Medium(0), "Q: What is here? A:"]
    assert pieces(user(Medium(0), Medium(1), Text("Same?"))) == [Medium(0), Medium(1), "Q: Same? A:"]
    within = user(Text("Is "), Medium(0), Text(" like "), Medium(1), Text("? "))
    assert pieces(within) == ["Q: Is ", Medium(0), " like ", Medium(1), "? A:"]
    assert pieces(user(Medium(0), Text(" or "), Medium(1))) == [Medium(0), "Q: or ", Medium(1), " A:"]


def test_a_chat_and_the_same_asked_again_are_written_alike():
    first, media = from_prompt("<image>What?", ["a.png"])
    answered = (*first, assistant("A cat."))
    asked, whole = processor().write(first, open=True), processor().write(answered)
    assert len(media) == 1
    assert whole.tokens.tolist() == [*asked.tokens, *map(ord, " A cat."), EOC]
    both = processor().write((*answered, *from_prompt("Why?")[0]), open=True)
    assert both.tokens[: len(whole.tokens)].tolist() == whole.tokens.tolist()


def test_neighbouring_texts_are_tokenised_together():
    """Of a system's words and a question's: "ab" is one token and would be two of "a" and "b"."""
    tokenizer = train_tokenizer(["ab"] * 9, 262)
    got = RecipeProcessor(tokenizer, dataclasses.replace(DATA, prompt="{question}"))
    turns = (Turn("system", (Text("a"),)), user(Text("b")), assistant("a"))
    assert got.write(turns).tokens.tolist() == [BOS, *tokenizer.encode("ab"), *tokenizer.encode(" a"), EOC]
    assert len(tokenizer.encode("ab")) == 1


def test_an_answer_goes_on_with_the_text_before_it():
    """A tokenizer that puts a space before every text puts none before an answer, which has its own."""
    tokenizer = Tokenizer(tiny_tokenizers.tokenizer("prepend"))
    got = RecipeProcessor(tokenizer, dataclasses.replace(DATA, prompt="USER: {question} ASSISTANT:"))
    tokens = got.write((user(Text("what color is the shape?")), assistant("red"))).tokens
    assert tokens.tolist() == [
        tokenizer.bos_id,
        *tokenizer.encode("USER: what color is the shape? ASSISTANT: red"),
        tokenizer.eoc_id,
    ]


def test_a_typed_marker_is_not_an_image():
    tokenizer = train_tokenizer(["what color is the shape?"], 300)
    got = RecipeProcessor(tokenizer, DATA).write((seen(0), read("<image> <EOC>"), learned(" red")))
    assert (got.tokens == tokenizer.image_id).sum() == 1
    assert got.tokens.tolist().index(tokenizer.eoc_id) == len(got.tokens) - 1


@pytest.mark.parametrize("change", [{"prompt": "Q:"}, {"answer": "{anwser}"}, {"prompt": "{question}{question}"}])
def test_prompt_and_answer_strings_are_checked(change):
    with pytest.raises(DataError, match=f"data.{next(iter(change))}="):
        processor(**change).write((user(Text("Q")), assistant("A")))


def test_a_picture_in_an_answer():
    with pytest.raises(RequestError, match="pictures belong to the user's turns"):
        processor().write((user(Text("Q")), Turn("assistant", (Text("A"), Medium(0)), learn=True)))


def test_what_may_be_generated():
    allowed = processor().allowed(130)
    assert np.flatnonzero(~allowed).tolist() == [PAD, BOS, IMAGE, 128, 129]


def test_an_end_may_always_be_generated():
    """GPT-2 begins, ends and fills up with one and the same token."""
    tokenizer = Letters()
    tokenizer.pad_id = tokenizer.bos_id = tokenizer.eos_id
    assert np.flatnonzero(~RecipeProcessor(tokenizer, DATA).allowed(128)).tolist() == [IMAGE]


def test_equal_fingerprints_mean_that_all_is_written_alike():
    one = processor()
    assert processor(rows=3, augment=DATA.augment).fingerprint == one.fingerprint
    assert pickle.loads(pickle.dumps(one)).fingerprint == one.fingerprint
    changes = [
        {"prompt": "{question}"},
        {"answer": "{answer}"},
        {"visual_tokens": 4},
        {"image_size": 16},
        {"image_fit": "crop"},
    ]
    others = {processor(**change).fingerprint for change in changes}
    letters = Letters()
    letters.serialised = "other letters"
    others.add(RecipeProcessor(letters, DATA).fingerprint)
    assert len(others | {one.fingerprint}) == len(changes) + 2
