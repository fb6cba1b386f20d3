"""Evaluators: what is looked at while a run trains, beside the objective's own held-out evaluation."""

from __future__ import annotations

from typing import Literal

from vlm_jax.config.data import SourceConfig
from vlm_jax.config.frozen import Kinds, frozen


@frozen
class EvaluatorConfig(Kinds):
    """An evaluator. Every one runs at the end of the run too."""

    every: int = 0  # steps; 0: at the end only
    # Its metrics stand in metrics.jsonl as `eval_NAME_METRIC`; "": its kind.
    name: str = ""

    @property
    def label(self) -> str:
        return self.name or self.kind


@frozen
class RankingConfig(EvaluatorConfig):
    """Which of all held-out captions a picture belongs to, by their likelihood (`training/evaluators/ranking.py`)."""

    kind: Literal["ranking"] = "ranking"
    captions: int = 0  # candidates, evenly spread over the held-out ones; 0: all
    pictures: int = 0  # that are looked at, evenly spread; 0: one for each candidate
    score: Literal["sum", "mean"] = "sum"  # of the log-probabilities of a caption's tokens
    blank: bool = False  # the control: every picture grey
    shots: int = 0  # other held-out examples that are shown solved before each picture (few-shot)
    seed: int = 0  # of their choice
    rows: int = 16  # pictures that one program reads at once


@frozen
class GenerationConfig(EvaluatorConfig):
    """Answers to held-out questions, and how good they are (`training/evaluators/generation.py`)."""

    kind: Literal["generation"] = "generation"
    metric: str = "exact_match"  # a name of `evaluation/metrics.py`
    examples: int = 0  # questions, evenly spread over the held-out ones; 0: all
    max_new_tokens: int = 32
    beams: int = 1  # 1: greedy
    blank: bool = False  # the control: every picture grey
    shots: int = 0  # other held-out examples that are shown solved before each question (few-shot)
    seed: int = 0  # of their choice
    rows: int = 16  # questions that are answered at once


@frozen
class SamplesConfig(EvaluatorConfig):
    """Some held-out examples with their pictures and answers, to look at (`training/evaluators/samples.py`)."""

    kind: Literal["samples"] = "samples"
    examples: int = 6  # evenly spread over the held-out ones
    max_new_tokens: int = 32


@frozen
class RetrievalConfig(EvaluatorConfig):
    """Two towers: the held-out images are looked for by their captions, and captions by their images."""

    kind: Literal["retrieval"] = "retrieval"
    at: tuple[int, ...] = (1, 5, 10)


@frozen
class ZeroShotConfig(EvaluatorConfig):
    """Two towers: held-out images of a labelled set are classified by the names of its classes (Radford et al. 2021)."""

    kind: Literal["zero_shot"] = "zero_shot"
    source: SourceConfig  # an example's text is the name of its class
    templates: tuple[str, ...] = ("a photo of a {}.",)  # a class is the mean of its texts
    images: int = 0  # only so many, from the beginning; 0: all
