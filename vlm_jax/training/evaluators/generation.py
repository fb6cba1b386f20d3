"""Answers to held-out questions, generated as in inference, and a metric of them."""

from __future__ import annotations

import logging

from vlm_jax.config import GenerationConfig, RunConfig
from vlm_jax.config.generation import Settings
from vlm_jax.errors import DataError, RequestError
from vlm_jax.evaluation.held_out import HeldOut, held_out_questions
from vlm_jax.evaluation.metrics import METRICS, metric_names
from vlm_jax.generation.generator import Generator
from vlm_jax.generation.prompts import Prompt
from vlm_jax.processing.pictures import ImageError
from vlm_jax.processing.processor import blanked
from vlm_jax.training.evaluator import EVALUATORS, Evaluation, RunParts
from vlm_jax.training.step import TrainState

log = logging.getLogger(__name__)


class Answering:
    """A run's model in training, asked about held-out examples through its own processor. Programs are compiled once."""

    def __init__(
        self, parts: RunParts, *, examples: int, settings: Settings, rows: int, blank: bool = False, label: str
    ) -> None:
        """
        Args:
          examples: questions, evenly spread; 0: all.
          label: of the evaluator, for error messages.

        Raises:
          ValueError: a model that does not answer, or no questions.
        """
        config: RunConfig = parts.config
        if not config.model.answers:
            raise ValueError(f"{label}: the model writes no answers: take this evaluator out of config.evaluators")
        self._label, self._settings = label, settings
        self._skips = config.data.source.bad_lines == "skip"
        trainer = parts.trainer
        processor = blanked(parts.processor) if blank else parts.processor
        self.generator = Generator(
            trainer.model, trainer.abstract_state.params, processor, trainer.mesh, rows=rows, take_over=False
        )
        self.questions = held_out_questions(parts.held_out, examples, skip=self._skips)
        if not self.questions:
            raise ValueError(f"{label}: there are no held-out examples: name some in config.data.source")

    def answers(self, state: TrainState) -> list[tuple[HeldOut, str]]:
        """The questions with what the model says, white space around it left away.

        Raises:
          DataError: a question that does not fit the model, or a picture that cannot be read and is not to be left out.
        """
        found: dict[int, str] = {}
        with self.generator.holding(state.params):
            prompts = [self._prompt(number, question) for number, question in enumerate(self.questions)]
            asked = [number for number, prompt in enumerate(prompts) if prompt is not None]
            refuse = lambda place, error: self._refused(self.questions[asked[place]], error)
            for batch in self.generator.batches([prompts[number] for number in asked], self._settings, refuse=refuse):
                found |= {asked[place]: answer.text for place, answer in batch.items()}
        return [(self.questions[number], found[number]) for number in sorted(found)]

    def _prompt(self, number: int, question: HeldOut) -> Prompt | None:
        try:
            return self.generator.prompt(question.request, number, self._settings)
        except (RequestError, ImageError) as error:
            self._refused(question, error)
            return None

    def _refused(self, question: HeldOut, error: Exception) -> None:
        if not (self._skips and isinstance(error, ImageError)):
            raise DataError(f"{self._label}: {question.id}: {error}") from error
        log.warning("%s: left out: %s: %s", self._label, question.id, error)


@EVALUATORS.add(GenerationConfig)
class Generation:
    """
    Attributes:
      metrics: those of the metric that the configuration names.
    """

    def __init__(self, config: GenerationConfig, parts: RunParts) -> None:
        """
        Raises:
          ValueError: an unknown metric, or a run that answers no questions.
        """
        self._metric, self._blank = METRICS[config.metric], config.blank
        self.metrics = metric_names(self._metric)
        settings = Settings(max_new_tokens=config.max_new_tokens, beams=config.beams)
        self._answering = Answering(
            parts, examples=config.examples, settings=settings, rows=config.rows, blank=config.blank, label=config.label
        )

    def evaluate(self, state: TrainState) -> Evaluation:
        answered = self._answering.answers(state)
        found = self._metric([text for _, text in answered], [list(question.answers) for question, _ in answered])
        values = ", ".join(f"{name} {found[name]:.4f}" for name in self.metrics)
        return Evaluation(metrics=found, line=f"{values} on {len(answered):,} answers{' (blank)' * self._blank}")
