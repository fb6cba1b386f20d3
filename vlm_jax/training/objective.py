"""What the loop, the optimizer and the checkpoints ask of an objective. None of them knows which one runs."""

from __future__ import annotations

from typing import Any, Protocol

import flax.linen as nn
import jax

from vlm_jax.batch import Batch
from vlm_jax.config.register import Register

Array = jax.Array
Sums = dict[str, Array]  # scalars; "loss" among them


class Objective(Protocol):
    """What is learned from a batch.

    Attributes:
      ranks: the metric of an evaluation by which the best checkpoints are kept; greater is better.
      examples: the metric that counts what a batch has of examples, for the speed that is reported.
    """

    ranks: str
    examples: str

    def weight(self, batch: Batch) -> Array:
        """[] float32, at least 1: what the summed loss of the whole batch is divided by."""
        ...

    def sums(self, model: nn.Module, params: Any, batch: Batch, *, recompute: bool = True) -> Sums:
        """Sums over the rows of a batch, so that those of several batches add up.

        Args:
          recompute: whether memory is saved by computing things twice.
        """
        ...

    def means(self, sums: dict[str, Any]) -> dict[str, Any]:
        """What is reported of such sums. Nothing to learn from gives 0."""
        ...

    def training_line(self, metrics: dict[str, float]) -> str:
        """What the progress line tells of the means of some steps."""
        ...

    def evaluation_line(self, metrics: dict[str, float]) -> str:
        """What is told of the means of an evaluation."""
        ...


# By the class of `RunConfig.objective`; each is made from its configuration.
OBJECTIVES: Register[Any] = Register("an objective for the configuration", "vlm_jax.training.objectives")
