"""VQA's normalisation and accuracy beside the reference's values (`vqaEval.py`)."""

import pytest

from vlm_jax.evaluation.metrics import METRICS
from vlm_jax.evaluation.vqa_accuracy import answer_accuracy
from vlm_jax.evaluation.vqa_text import normalised

GOLDEN = {
    "Yes.": "yes",
    "10,000": "10000",
    "two": "2",
    "none": "0",
    "dont know": "don't know",
    "The  Dog's": "dog's",
    "U.S.A.": "usa",
    "left/right": "left right",
    "a": "",
    "it's 3.5": "it's 3.5",
    "(yes)": "yes",
    "$5": "$5",
    "100%": "100%",
    "3:30": "3:30",
}


@pytest.mark.parametrize("text", GOLDEN)
def test_answers_are_normalised_as_the_reference_does(text):
    assert normalised(text).strip() == GOLDEN[text]


@pytest.mark.parametrize("agree, accuracy", [(0, 0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1), (10, 1)])
def test_agreement_of_ten_annotators(agree, accuracy):
    answers = ["Red."] * agree + [f"colour {number}" for number in range(10 - agree)]
    assert answer_accuracy("red" if agree < 10 else "Red.", answers) == pytest.approx(accuracy)


def test_answers_on_which_all_agree_are_compared_as_they_are():
    assert answer_accuracy("red", ["red."] * 10) == 0 and answer_accuracy("red.\n", ["red."] * 10) == 1
    assert METRICS["vqa_accuracy"](["red", "4"], [["red"], ["four"] * 9 + ["5"]]) == {"vqa_accuracy": 1.0}


def test_exact_match_normalises_both_sides():
    assert METRICS["exact_match"](["Yes.", "a red cat", "two"], [["yes"], ["blue", "the red cat"], ["3"]]) == {
        "exact_match": 2 / 3
    }
