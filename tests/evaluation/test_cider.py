"""CIDEr-D beside pycocoevalcap's values."""

import pytest

from vlm_jax.evaluation.cider import cider_of_each, tokens
from vlm_jax.evaluation.metrics import METRICS

REFERENCES = [
    ["a cat sits on a mat", "a cat is sitting on the mat"],
    ["two dogs run in the park", "dogs are running through a park"],
    ["a man rides a red bike", "a person riding a bicycle down a street"],
]
SHORT = ["a cat on a mat", "dogs in a park", "a man on a bike"]


@pytest.mark.parametrize(
    "predictions, corpus, each",
    [
        ([texts[0] for texts in REFERENCES], 5.511438659, [6.040990551, 5.493325427, 5.0]),
        (SHORT, 2.067496998, [3.395488177, 1.819615867, 0.987386950]),
    ],
)
def test_values_of_the_reference(predictions, corpus, each):
    assert METRICS["cider"](predictions, REFERENCES)["cider"] == pytest.approx(corpus, abs=1e-8)
    assert cider_of_each(predictions, REFERENCES) == pytest.approx(each, abs=1e-8)


def test_one_picture_knows_no_rare_words():
    assert METRICS["cider"](SHORT[:1], REFERENCES[:1]) == {"cider": 0.0}


def test_case_and_punctuation_do_not_count():
    written = [f"{text.capitalize()}!" for text in SHORT]
    assert METRICS["cider"](written, REFERENCES) == METRICS["cider"](SHORT, REFERENCES)
    assert METRICS["cider"](["", "", ""], REFERENCES) == {"cider": 0.0}


@pytest.mark.parametrize(
    "caption, words",
    [
        ("A dog's ball, isn't it?", "a dog 's ball is n't it"),
        ("They can't and cannot; we'll see.", "they ca n't and can not we 'll see"),
        ("A black-and-white T-shirt", "a black-and-white t-shirt"),
        ("1,000 trees (3.5 m) at 3:30", "1,000 trees 3.5 m at 3:30"),
        ("The U.S. flag -- 'new'", "the u.s. flag new"),
    ],
)
def test_words_as_the_penn_treebank_has_them(caption, words):
    assert tokens(caption) == words.split()
