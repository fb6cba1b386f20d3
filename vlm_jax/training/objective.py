"""The interface of training objectives, for the loop, the optimizer and the checkpoints."""

from __future__ import annotations

from typing import Any, Protocol

import flax.linen as nn
import jax

from vlm_jax.batch import Batch
from vlm_jax.config.register import Register

Array = jax.Array
Sums = dict[str, Array]  # scalars; "loss" among them


class Objective(Protocol):
    """The training objective.

    Attributes:
      checkpoint_metric: evaluation metric that ranks checkpoints (higher is better).
      examples_metric: metric that counts the examples of a batch, for the reported speed.

    Two more are for those that need them:
      whole_batch: True: the losses of micro-batches do not add up. `sums` gets the whole batch and, as `micro`, how many
        micro-batches `optimizer.accumulate` says it is to be computed in.
      bound(trained): the trained parameters after an update, brought back within the bounds that they have.
    """

    checkpoint_metric: str
    examples_metric: str

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
        """The reported metrics of such sums; 0 if there is nothing to learn from."""
        ...

    def training_line(self, metrics: dict[str, float]) -> str:
        """Formats training metrics for the progress line."""
        ...

    def evaluation_line(self, metrics: dict[str, float]) -> str:
        """Formats evaluation metrics."""
        ...


# By the class of `RunConfig.objective`; each is made from its configuration.
OBJECTIVES: Register[Any] = Register("an objective for the configuration", "vlm_jax.training.objectives")
