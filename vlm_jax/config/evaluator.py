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
