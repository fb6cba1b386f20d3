"""The interface of evaluators, and those of a run: which are due, how they are reported.

An evaluator looks at the model while it trains, at a cadence of its own: it answers held-out questions, ranks captions, draws
samples. The loop knows none of them.
"""

from __future__ import annotations

import dataclasses
import math
import re
import time
from typing import Any, Protocol

import jax
import numpy as np

from vlm_jax.config import EvaluatorConfig, RunConfig
from vlm_jax.config.register import Register
from vlm_jax.data.example import Source
from vlm_jax.processing.processor import Processor
from vlm_jax.progress import human_time
from vlm_jax.training.objective import in_set
from vlm_jax.training.report import Reporter
from vlm_jax.training.sets import evaluated
from vlm_jax.training.step import Trainer, TrainState, zeros_batch

# What else stands in a run's folder: the pictures of an evaluator are in a folder of its name.
TAKEN = ("checkpoints", "damaged", "processor", "published", "tensorboard", "tokenizer", "wandb")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunParts:
    """What an evaluator is made from, beside its configuration."""

    config: RunConfig
    trainer: Trainer
    processor: Processor
    source: Source  # the training examples
    held_out: Source


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What an evaluator found."""

    metrics: dict[str, float]  # those of `Evaluator.metrics`
    line: str = ""  # for the terminal; "": the metrics as they are
    # [height, width, 3] uint8 by name, for the boards; "": also a file, RUN/NAME/step-000500.png.
    pictures: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
    texts: dict[str, str] = dataclasses.field(default_factory=dict)  # Markdown by name, for the boards


class Evaluator(Protocol):
    """Made from its configuration and `RunParts` before the first step, within `jax.set_mesh(trainer.mesh)`.

    Raises there:
      ValueError: it cannot evaluate this run; the message says what to change.

    Attributes:
      metrics: names of what `evaluate` measures.
    """

    metrics: tuple[str, ...]

    def evaluate(self, state: TrainState) -> Evaluation:
        """Looks at the model, and leaves the state as it is.

        The same state gives the same metrics: a run that was killed and resumed writes what an undisturbed one does. All
        processes of a run call it, and all get the same.
        """
        ...


# By the class of a configuration of `RunConfig.evaluators`; each takes it and `RunParts`.
EVALUATORS: Register[Any] = Register("an evaluator for the configuration", "vlm_jax.training.evaluators")


class Evaluators:
    """The evaluators of a run."""

    def __init__(self, parts: RunParts) -> None:
        """
        Raises:
          ValueError: a name that is taken or cannot be one, or an evaluator that cannot evaluate this run.
        """
        self._configs: dict[str, EvaluatorConfig] = {}
        for config in parts.config.evaluators:
            _check(config, self._configs)
            self._configs[config.label] = config
        self._evaluators = {label: EVALUATORS[type(of)](of, parts) for label, of in self._configs.items()}
        self._check_best(parts)

    def _check_best(self, parts: RunParts) -> None:
        best = parts.config.best_by
        if not best:
            return
        config, trainer = parts.config, parts.trainer
        own = {
            f"{label}_{name}": self._configs[label].every
            for label, evaluator in self._evaluators.items()
            for name in evaluator.metrics
        }
        batch = jax.eval_shape(lambda: zeros_batch(config, config.data.rows))
        sums = jax.eval_shape(trainer.eval_step, trainer.abstract_state, batch)
        means = trainer.objective.means({name: np.float64(0) for name in sums})
        of_sets = [in_set(of, name) for of in evaluated(config) for name in means]
        known = dict.fromkeys(of_sets, config.eval_every) | own
        every = known.get(best.removeprefix("-"))
        if every is None:
            raise ValueError(f"config.best_by={best!r}: no evaluation measures it; expected one of {', '.join(sorted(known))}")
        if not every or math.lcm(every, config.save_every) > config.steps:
            raise ValueError(
                f"config.best_by={best!r} is measured {f'every {every} steps' if every else 'at the end only'} and checkpoints "
                f"are saved every {config.save_every}: only the last of {config.steps} steps would have both. Let one be a "
                "multiple of the other"
            )

    def evaluate(self, state: TrainState, step: int, *, last: bool, reporter: Reporter) -> dict[str, float]:
        """Runs those that are due at `step`, and reports what they find.

        Returns:
          their metrics, as `NAME_METRIC`.
        """
        found: dict[str, float] = {}
        for label, evaluator in self._evaluators.items():
            every = self._configs[label].every
            if not last and (not every or step % every):
                continue
            began = time.perf_counter()
            evaluation = evaluator.evaluate(state)
            named = {f"{label}_{name}": float(evaluation.metrics[name]) for name in evaluator.metrics}
            found |= named
            if named:
                reporter.record(step, named, "eval_")
            took = time.perf_counter() - began
            reporter.plot(step, {f"eval/{name}": value for name, value in named.items()} | {f"speed/{label}": took})
            reporter.show(step, label, pictures=evaluation.pictures, texts=evaluation.texts)
            reporter.flush()
            line = evaluation.line or ", ".join(f"{name} {value:.4g}" for name, value in evaluation.metrics.items())
            reporter.say(f"step {step}: {label}: {line}, in {human_time(took)}")
        return found


def _check(config: EvaluatorConfig, others: dict[str, EvaluatorConfig]) -> None:
    label = config.label
    if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_]*", label) or label in TAKEN:
        raise ValueError(
            f"config.evaluators: the name {label!r}: expected letters, digits and underscores, and none of {', '.join(TAKEN)}"
        )
    if label in others:
        raise ValueError(f"config.evaluators: two are called {label!r}: set another `name` for one of them")
    if config.every < 0:
        raise ValueError(f"config.evaluators: {label}.every={config.every}: expected steps, or 0 for the end only")
