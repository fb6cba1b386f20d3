import pytest

from vlm_jax.evaluation.metrics import METRICS
from vlm_jax.evaluation.pope import pope, says_yes


@pytest.mark.parametrize(
    ("answer", "yes"),
    [
        ("yes", True),
        ("No", False),
        ("no", False),
        ("No, there is a cat.", False),
        ("There is not a dog.", False),
        ("Yes. It is not a cat.", True),  # only the first sentence counts
        ("Nothing is there", True),  # as in the reference, which looks for whole words
        ("NO", True),
        ("", True),
    ],
)
def test_what_is_read_as_yes(answer, yes):
    assert says_yes(answer) == yes


def test_scores_of_a_table():
    """6 true, 2 false positives, 3 true, 1 false negatives."""
    predictions = ["yes"] * 6 + ["Yes, it is"] * 2 + ["no"] * 3 + ["No."]
    answers = ["yes"] * 6 + ["no"] * 2 + ["no"] * 3 + ["yes"]
    assert pope(predictions, answers) == pytest.approx(
        {
            "accuracy": 9 / 12,
            "precision": 6 / 8,
            "recall": 6 / 7,
            "f1": 2 * 6 / (2 * 6 + 2 + 1),
            "yes_share": 8 / 12,
            "true_yes_share": 7 / 12,
            "questions": 12,
        }
    )


def test_the_share_of_yes_is_of_the_predictions():
    assert pope(["yes", "yes"], ["no", "no"])["yes_share"] == 1
    assert pope(["no", "no"], ["yes", "yes"]) == pytest.approx(
        dict(accuracy=0, precision=0, recall=0, f1=0, yes_share=0, true_yes_share=1, questions=2)
    )
    assert not any(pope([], []).values())
    with pytest.raises(ValueError, match="1 predictions and 0 answers"):
        pope(["yes"], [])


def test_an_evaluator_finds_it_by_its_name():
    assert METRICS["pope"](["yes", "no"], [["yes"], ["yes"]]) == pope(["yes", "no"], ["yes", "yes"])
