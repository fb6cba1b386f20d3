"""Evaluators: what is looked at while a run trains, beside the objective's own held-out evaluation."""

from __future__ import annotations

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
