"""The interface of training objectives, for the loop, the optimizer and the checkpoints."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax

from vlm_jax.batch import Batch
from vlm_jax.config.register import Register
from vlm_jax.paths import Params

Array = jax.Array
Sums = dict[str, Array]  # scalars; "loss" among them


def in_set(of: str, name: str) -> str:
    """The name of a metric or member of a set of data: "ltip" and "loss" -> "ltip/loss"; of the run's own set, "", "loss"."""
    return f"{of}/{name}" if of else name


def by_set(metrics: dict[str, float]) -> dict[str, dict[str, float]]:
    """{"loss": 1, "ltip/loss": 2} -> {"": {"loss": 1}, "ltip": {"loss": 2}}: metrics by the names of their sets or members."""
    found: dict[str, dict[str, float]] = {}
    for name, value in metrics.items():
        of, _, metric = name.rpartition("/")
        found.setdefault(of, {})[metric] = value
    return found


class Objective:
    """The training objective.

    Attributes:
      checkpoint_metric: evaluation metric that ranks checkpoints (higher is better).
      examples_metric: metric that counts the examples of a batch, for the reported speed.
      whole_batch: whether the losses of micro-batches do not add up. `sums` gets the whole batch then, and as `micro` how many
        micro-batches `optimizer.accumulate` says it is to be computed in.
      reads_pairs: whether a batch holds pairs of answers (`Batch.preference`).
    """

    checkpoint_metric: str
    examples_metric: str
    whole_batch: bool = False
    reads_pairs: bool = False

    def weight(self, batch: Batch) -> Array:
        """[] float32, at least 1: what the summed loss of the whole batch is divided by."""
        raise NotImplementedError

    def sums(self, model: nn.Module, params: Any, batch: Batch, *, recompute: bool = True) -> Sums:
        """Sums over the rows of a batch, so that those of several batches add up.

        Also gets `micro` where `whole_batch`, and `reference` where `reference_of` gives any.

        Args:
          recompute: whether memory is saved by computing things twice.
        """
        raise NotImplementedError

    def means(self, sums: dict[str, Any]) -> dict[str, Any]:
        """The reported metrics of such sums; 0 if there is nothing to learn from."""
        raise NotImplementedError

    def training_line(self, metrics: dict[str, float]) -> str:
        """Formats training metrics for the progress line."""
        raise NotImplementedError

    def evaluation_line(self, metrics: dict[str, float]) -> str:
        """Formats evaluation metrics."""
        raise NotImplementedError

    def reference_of(self, trained: Params) -> Params:
        """Frozen copies of the parameters as a run begins with them, which its state keeps; {}: none."""
        return {}

    def describe_reference(self, trained: Params) -> str:
        """The reference, for the log of a run's start; "": there is none."""
        return ""

    def check_start(self, trained: Params) -> None:
        """Warns of parameters that a run should not begin with."""

    def bound(self, trained: Params) -> Params:
        """The trained parameters after an update, brought back within the bounds that they have."""
        return trained


# By the class of `RunConfig.objective`; each is made from its configuration.
OBJECTIVES: Register[Any] = Register("an objective for the configuration", "vlm_jax.training.objectives")
