"""The register of metrics: what answers are worth, beside those that are right.

    @METRICS.add("exact_match")
    def exact_match(predictions: list[str], references: list[list[str]]) -> dict[str, float]: ...

A metric of one answer a question, `fn(predictions, answers)`, is registered by `METRICS.add("pope")(of_one_answer(pope))`.
"""

from __future__ import annotations

from collections.abc import Callable

from vlm_jax.config.register import Register
from vlm_jax.evaluation.vqa_text import normalised

Metric = Callable[[list[str], list[list[str]]], dict[str, float]]

# Each takes what was answered and, for every question, the answers that are right. It gives the same names for any of them, and
# shares are between 0 and 1.
METRICS: Register[Metric] = Register("a metric", "vlm_jax.evaluation")


def metric_names(metric: Metric) -> tuple[str, ...]:
    """The names of what a metric gives."""
    return tuple(metric(["yes"], [["yes"]]))


def of_one_answer(fn: Callable[[list[str], list[str]], dict[str, float]]) -> Metric:
    """A metric that knows one right answer a question: the first."""
    return lambda predictions, references: fn(predictions, [right[0] for right in references])


@METRICS.add("exact_match")
def exact_match(predictions: list[str], references: list[list[str]]) -> dict[str, float]:
    """The share of answers that equal a right one once both are normalised as VQA's are ("Yes." is "yes", "two" is "2")."""
    hits = [normalised(text) in {normalised(one) for one in right} for text, right in zip(predictions, references, strict=True)]
    return {"exact_match": sum(hits) / max(len(hits), 1)}
