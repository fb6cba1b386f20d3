"""What a user asks: texts and pictures in any order, or a question with its pictures and solved examples of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence as Many
from pathlib import Path
from typing import Any

import numpy as np
from PIL.Image import Image

from vlm_jax.config import DataConfig
from vlm_jax.data.example import ImageAt, Sequence, Text
from vlm_jax.data.images import ImageError, blank_image, fit_image, read_image
from vlm_jax.data.jsonl_record import split_markers

MARKER = "<image>"

Picture = str | Path | bytes | np.ndarray | Image  # a file, its bytes, or pixels [H, W, 3] uint8


class RequestError(ValueError):
    """A request the model cannot answer; the message says what to change."""


@dataclasses.dataclass(frozen=True, slots=True)
class Shot:
    """A solved example that is shown before the question (few-shot, "in-context" learning)."""

    images: Many[Picture]
    question: str
    answer: str


@dataclasses.dataclass(frozen=True, slots=True)
class Request:
    """A prompt: `parts` name the slots of `images`, each of one picture or of the frames of a film."""

    parts: Sequence
    images: tuple[tuple[Picture, ...], ...] = ()
    seed: int | None = None  # of its samples, together with `Settings.seed`; None: its number among the requests


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """How answers are generated.

    `stop` ends an answer where its text first contains one of the strings, which may begin and end within tokens; the text
    is cut before it.
    """

    max_new_tokens: int = 64
    temperature: float = 0.0  # 0: always the likeliest token
    top_k: int = 0  # only the k likeliest; 0: all
    top_p: float = 1.0  # only the likeliest that together reach p
    repetition_penalty: float = 1.0  # above 1: tokens that were there already, also in the prompt, are less likely
    beams: int = 1  # above 1: beam search, which is deterministic and knows no stop strings
    length_penalty: float = 1.0  # of beams: an answer counts with its log-probability / its length to this power
    early_stopping: bool = False  # of beams: end as soon as that many answers are finished
    stop: tuple[str, ...] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        def check(name: str, good: bool, expected: str) -> None:
            if not good:
                raise RequestError(f"{name}={getattr(self, name)!r}: expected {expected}")

        check("max_new_tokens", self.max_new_tokens >= 1, "1 or more")
        check("temperature", 0 <= self.temperature < float("inf"), "0 (greedy) or more")
        check("top_k", 0 <= self.top_k < 2**31, "0 (all tokens) or more")
        check("top_p", 0 < self.top_p <= 1, "more than 0 and at most 1")
        check("repetition_penalty", 0 < self.repetition_penalty < float("inf"), "more than 0")
        check("beams", self.beams >= 1, "1 or more")
        check("length_penalty", abs(self.length_penalty) < float("inf"), "a number")
        if self.beams > 1 and (self.temperature or self.stop):
            raise RequestError(
                f"beams={self.beams}: beam search neither samples nor knows stop strings: set temperature=0 and leave stop "
                "out, or set beams=1"
            )
        check("stop", not isinstance(self.stop, str) and all(self.stop), "a tuple of strings that are not empty")
        check("seed", 0 <= self.seed < 2**63, "0 or more")


def interleaved(parts: Many[str | Picture | tuple[Picture, ...]], seed: int | None = None) -> Request:
    """Texts and pictures as they come: `[picture, "a cat", picture, "a"]` with pictures that are not plain strings.

    Args:
      parts: a str is text; a Path, bytes, an array or a PIL image is a picture, a tuple of them a film.
    """
    laid, images = [], []
    for part in parts:
        if isinstance(part, str):
            laid.append(Text(part, learn=False))
        else:
            laid.append(ImageAt(len(images)))
            images.append(part if isinstance(part, tuple) else (part,))
    return Request(tuple(laid), tuple(images), seed)


def ask(
    config: DataConfig, question: str, images: Many[Picture] = (), shots: Many[Shot] = (), seed: int | None = None
) -> Request:
    """A question as the model was trained to read it: `config.prompt` around it, its pictures in front.

    The literal `<image>` in the question places a picture instead, as in a conversation of `data/jsonl.py`. Every shot is
    laid out the same way, with its answer in `config.answer`, and closed with `<EOC>`.

    Raises:
      RequestError: another number of pictures than of markers.
    """
    parts: list[Any] = []
    slots: list[tuple[Picture, ...]] = []

    before, after = config.prompt.split("{question}")

    def place(image: Any) -> None:
        parts.append(ImageAt(len(slots)))
        slots.append(tuple(image) if isinstance(image, tuple | list) else (image,))

    def turn(name: str, question: str, images: Many[Picture]) -> None:
        leading, texts = split_markers(marked(name, question, len(images)))
        texts[0] = before + texts[0]
        texts[-1] += after
        for image in images[:leading]:
            place(image)
        for number, text in enumerate(texts):
            if number:
                place(images[leading + number - 1])
            if text:
                parts.append(Text(text, learn=False))

    for number, shot in enumerate(shots, 1):
        turn(f"example {number}", shot.question, shot.images)
        parts.append(Text(config.answer.replace("{answer}", shot.answer), learn=True))
    turn("the prompt", question, images)
    return Request(tuple(parts), tuple(slots), seed)


def marked(name: str, question: str, images: int) -> str:
    """The question with a `<image>` for each of its pictures: in front if it has none.

    Args:
      name: what messages call it.

    Raises:
      RequestError: another number of pictures than of markers.
    """
    markers = question.count(MARKER)
    if markers and markers != images:
        raise RequestError(
            f"{name} has {_count(markers, MARKER + ' marker')} and {_count(images, 'image')}: "
            "give an image for every marker, or leave the markers out and all images come first"
        )
    return question if markers else MARKER * images + question


def _count(number: int, name: str) -> str:
    return f"{number} {name}{'' if number == 1 else 's'}"


def pixels(picture: Picture, config: DataConfig) -> np.ndarray:
    """A picture as the model sees it: [S, S, 3] uint8.

    Raises:
      ImageError: it cannot be read or fitted.
    """
    if config.blank_images:
        return blank_image(config.image_size)
    try:
        return fit_image(array_of(picture), config.image_size, config.image_fit)
    except ImageError as error:
        raise ImageError(f"picture {_name(picture)}: {error}") from None


def array_of(picture: Picture, on_white: bool = True) -> np.ndarray:
    """A picture's own pixels: [H, W, 3] uint8. For `on_white` see `read_image`.

    Raises:
      ImageError: it cannot be read.
    """
    if isinstance(picture, str | Path | bytes):
        return read_image(picture, on_white)
    array = np.asarray(picture.convert("RGB") if isinstance(picture, Image) else picture)
    if array.ndim != 3 or array.shape[2] != 3 or array.dtype != np.uint8:
        raise ImageError(f"picture {_name(picture)}: expected [H, W, 3] uint8, found {list(array.shape)} {array.dtype}")
    return array


def _name(picture: Picture) -> str:
    return "<bytes>" if isinstance(picture, bytes) else str(picture) if isinstance(picture, str | Path) else "<pixels>"
