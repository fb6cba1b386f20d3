"""Sample answers to look at: pictures, questions, what is right and what the model says, on one sheet."""

from __future__ import annotations

import dataclasses
import textwrap
from collections.abc import Iterator

import numpy as np
from PIL import Image

from vlm_jax.config import SamplesConfig
from vlm_jax.config.generation import Settings
from vlm_jax.evaluation.held_out import HeldOut
from vlm_jax.evaluation.vqa_text import normalised
from vlm_jax.processing.conversation import plain_text
from vlm_jax.processing.pictures import read_image
from vlm_jax.training.evaluator import EVALUATORS, Evaluation, RunParts
from vlm_jax.training.evaluators.generation import Answering
from vlm_jax.training.step import TrainState

ACROSS = 3  # panels side by side
WIDTH = 3.2  # inches of a panel
LINE, FONT = 0.19, 9.5  # inches a line of text takes, and the size of its letters in points
LETTERS = 40  # that fit into a panel side by side
MOST_LINES = 5  # of a question or an answer
PIXELS = 256  # the height that pictures are brought to before several are put side by side
GREY, BLACK, GREEN, RED = "#666666", "#000000", "#1a7f37", "#c0392b"


@dataclasses.dataclass(frozen=True, slots=True)
class Sample:
    """A panel of the sheet."""

    pictures: list[np.ndarray]  # [height, width, 3] uint8 each
    question: str
    truth: str
    answer: str
    right: bool

    @classmethod
    def of(cls, question: HeldOut, answer: str) -> Sample:
        """Of a video the first frame is shown."""
        first, *others = question.answers
        return cls(
            pictures=[read_image(medium[0]) for medium in question.request.ordered],
            question=plain_text(question.request.turns),
            truth=f"{first} (or {len(others)} others)" if others else first,
            answer=answer,
            right=normalised(answer) in map(normalised, question.answers),
        )


@EVALUATORS.add(SamplesConfig)
class Samples:
    metrics = ()

    def __init__(self, config: SamplesConfig, parts: RunParts) -> None:
        """
        Raises:
          ValueError: a run that answers no questions.
        """
        if config.examples < 1:
            raise ValueError(f"{config.label}.examples={config.examples}: expected 1 or more")
        settings = Settings(max_new_tokens=config.max_new_tokens)
        self._answering = Answering(
            parts, examples=config.examples, settings=settings, rows=config.examples, label=config.label
        )
        self._blind = parts.processor.blind

    def evaluate(self, state: TrainState) -> Evaluation:
        samples = [Sample.of(question, answer) for question, answer in self._answering.answers(state)]
        right = sum(sample.right for sample in samples)
        blind = " (the model sees grey)" if self._blind else ""
        line = f"{right} of {len(samples)} sample answers are right{blind}"
        return Evaluation(metrics={}, line=line, pictures={"": draw(samples)}, texts={"": markdown(samples)})


def markdown(samples: list[Sample]) -> str:
    """A table of the questions and answers."""
    cell = lambda text: " ".join(text.replace("|", r"\|").split())
    rows = [f"| {cell(s.question)} | {cell(s.truth)} | {cell(s.answer)} | {'yes' if s.right else ''} |" for s in samples]
    return "\n".join(["| question | truth | answer | right |", "|---|---|---|---|", *rows])


def draw(samples: list[Sample]) -> np.ndarray:
    """The sheet [height, width, 3] uint8: each panel is a picture, and below it the question, the truth and the answer."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    texts = [list(_lines(sample)) for sample in samples]
    rows = [range(start, min(start + ACROSS, len(samples))) for start in range(0, len(samples), ACROSS)]
    # Every row is as high as its longest text needs.
    below = [LINE * (max(len(texts[place]) for place in row) + 1) for row in rows]
    width, height = WIDTH * min(ACROSS, len(samples)), sum(WIDTH + room for room in below)
    figure = Figure(figsize=(width, height), facecolor="white")
    top = height
    for row, room in zip(rows, below, strict=True):
        for column, place in enumerate(row):
            left, side, foot = column * WIDTH + 0.1, WIDTH - 0.2, top - WIDTH
            axis = figure.add_axes((left / width, (foot + 0.1) / height, side / width, side / height))
            axis.axis("off")
            if samples[place].pictures:
                axis.imshow(_beside(samples[place].pictures))
            for number, (text, colour) in enumerate(texts[place]):
                at = (left / width, (foot - LINE * (number + 0.5)) / height)
                figure.text(*at, _plain(text), fontsize=FONT, color=colour, va="center")
        top -= WIDTH + room
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def _lines(sample: Sample) -> Iterator[tuple[str, str]]:
    """The lines of text, and their colours."""
    answer = sample.answer or "(nothing)"
    for text, colour in (
        (sample.question, GREY),
        (f"truth: {sample.truth}", BLACK),
        (f"answer: {answer}", GREEN if sample.right else RED),
    ):
        for line in textwrap.wrap(text, LETTERS, max_lines=MOST_LINES, placeholder=" ..."):
            yield line, colour


def _beside(pictures: list[np.ndarray]) -> np.ndarray:
    """Pictures side by side, brought to one height, with a white line between them."""
    parts: list[np.ndarray] = []
    for picture in pictures:
        height, width = picture.shape[:2]
        sized = Image.fromarray(picture).resize((max(1, round(width * PIXELS / height)), PIXELS), Image.Resampling.BICUBIC)
        parts += [np.full((PIXELS, 8, 3), 255, np.uint8), np.asarray(sized)]
    return np.concatenate(parts[1:], axis=1)


def _plain(text: str) -> str:
    """A line that matplotlib shows as it is: a dollar sign would begin a formula, and fonts have no control characters."""
    return "".join(letter if letter.isprintable() else "?" for letter in text).replace("$", r"\$")
