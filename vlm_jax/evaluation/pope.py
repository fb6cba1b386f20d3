"""POPE's scores of yes/no answers about what is in a picture (Li et al. 2023): a model that hallucinates says yes too often."""

from __future__ import annotations

from collections.abc import Sequence

from vlm_jax.evaluation.metrics import METRICS, of_one_answer

NO = frozenset(("No", "not", "no"))


def says_yes(answer: str) -> bool:
    """Whether an answer is read as yes: the words of its first sentence hold no "no" and no "not" (LLaVA's `eval_pope.py`)."""
    return not NO & set(answer.partition(".")[0].replace(",", "").split(" "))


def pope(predictions: Sequence[str], answers: Sequence[str]) -> dict[str, float]:
    """Scores with yes as the positive class; all are shares between 0 and 1, but for `questions`.

    `yes_share` is that of the predictions, beside `true_yes_share`, that of the truth.

    Args:
      predictions: what the model said; answers: the truth, read by the same rule.

    Raises:
      ValueError: not as many of the one as of the other.
    """
    if len(predictions) != len(answers):
        raise ValueError(f"{len(predictions)} predictions and {len(answers)} answers; expected equally many")
    said, true = [says_yes(text) for text in predictions], [says_yes(text) for text in answers]
    both = sum(ours and theirs for ours, theirs in zip(said, true, strict=True))
    right = sum(ours == theirs for ours, theirs in zip(said, true, strict=True))
    share = lambda part, whole: part / whole if whole else 0.0
    precision, recall = share(both, sum(said)), share(both, sum(true))
    return {
        "accuracy": share(right, len(said)),
        "precision": precision,
        "recall": recall,
        "f1": share(2 * precision * recall, precision + recall),
        "yes_share": share(sum(said), len(said)),
        "true_yes_share": share(sum(true), len(true)),
        "questions": float(len(said)),
    }


METRICS.add("pope")(of_one_answer(pope))
