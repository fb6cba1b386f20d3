"""VQA accuracy (Antol et al. 2015; `vqaEval.py` of GT-Vision-Lab/VQA)."""

from __future__ import annotations

from vlm_jax.evaluation.metrics import METRICS
from vlm_jax.evaluation.vqa_text import flat, normalised

ENOUGH = 3  # of the other annotators, who gave an answer that is wholly right
ANNOTATORS = 10


@METRICS.add("vqa_accuracy")
def vqa_accuracy(predictions: list[str], references: list[list[str]]) -> dict[str, float]:
    """The mean over questions; a question with a single right answer counts as if ten annotators had given it."""
    each = [answer_accuracy(text, answers) for text, answers in zip(predictions, references, strict=True)]
    return {"vqa_accuracy": sum(each) / max(len(each), 1)}


def answer_accuracy(prediction: str, answers: list[str]) -> float:
    """The mean over the annotators of min(1, how many of the others gave this answer / 3).

    As in the reference, answers are normalised only where the annotators did not all say the same.

    Of ten annotators 0, 1, 2, 3, 4 agree: 0, 0.3, 0.6, 0.9, 1.
    """
    answers = [flat(answer) for answer in (answers * ANNOTATORS if len(answers) == 1 else answers)]
    prediction = flat(prediction)
    if len(set(answers)) > 1:
        answers, prediction = [normalised(answer) for answer in answers], normalised(prediction)
    hits = [answer == prediction for answer in answers]
    return sum(min(1.0, (sum(hits) - hit) / ENOUGH) for hit in hits) / len(hits)
