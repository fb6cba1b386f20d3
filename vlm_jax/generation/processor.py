"""What stands between a request and the model: how it is laid out as tokens, and how its pictures become pixels.

A run of ours and every kind of published checkpoint have a processor each; the generator knows this interface alone.

Axis letters: T prompt tokens, F frames or tiles of a slot, H x W pixels, V vocabulary.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence as Many
from typing import Protocol

import numpy as np

from vlm_jax.config import DataConfig
from vlm_jax.data.encode import prompt_tokens, visual_of
from vlm_jax.data.tokenizer import Tokenizer
from vlm_jax.generation.request import Picture, Request, Settings, Shot, ask, pixels
from vlm_jax.generation.text import Codec


@dataclasses.dataclass(frozen=True, slots=True)
class Layout:
    """A request as tokens. All arrays are [T] int32."""

    tokens: np.ndarray
    media_last: np.ndarray
    media_first: np.ndarray
    slots: np.ndarray  # the slot, from 1, whose visual token stands here; 0: text
    offsets: np.ndarray  # which of the slot's visual tokens, frame after frame; -1: the newline


class Processor(Protocol):
    tokenizer: Codec
    ends: set[int]  # tokens that end an answer
    pad_id: int
    defaults: Settings  # what the checkpoint asks for
    blind: bool  # whether every picture is blanked, in a control experiment

    def ask(self, prompt: str, images: Many[Picture], shots: Many[Shot], seed: int | None) -> Request:
        """A question with its pictures and solved examples, as the model was trained to read it.

        Raises:
          RequestError: another number of pictures than of markers.
        """
        ...

    def lay_out(self, request: Request) -> Layout: ...

    def pixels(self, film: tuple[Picture, ...]) -> Many[np.ndarray]:
        """A slot's pictures as the model sees them: F times [H, W, 3] uint8; the sizes differ if the encoder takes such.

        Raises:
          ImageError: one cannot be read.
        """
        ...

    def allowed(self, vocabulary: int) -> np.ndarray:
        """[V] bool, what may be generated."""
        ...


class RunProcessor:
    """Of a run of ours: Flamingo's layout (`data/encode.py`), the run's prompt and its picture size."""

    defaults = Settings()

    def __init__(self, tokenizer: Tokenizer, data: DataConfig) -> None:
        self.tokenizer, self.data = tokenizer, data
        self.pad_id = tokenizer.pad_id
        self.blind = data.blank_images
        # A tokenizer may have no <EOC> apart from <EOS>, or use <EOS> as <BOS> or padding: an end is always allowed.
        self.ends = {tokenizer.eoc_id, tokenizer.eos_id}

    def ask(self, prompt: str, images: Many[Picture] = (), shots: Many[Shot] = (), seed: int | None = None) -> Request:
        return ask(self.data, prompt, images, shots, seed)

    def lay_out(self, request: Request) -> Layout:
        picture = self.data.picture_tokens
        tokens, last, first = prompt_tokens(request.parts, self.tokenizer, picture)
        if not self.data.visual_tokens:
            return Layout(tokens, last, first, np.zeros_like(tokens), np.zeros_like(tokens))
        stands = visual_of(tokens, self.tokenizer.image_id, last, picture) - 1
        return Layout(tokens, last, first, np.where(stands < 0, 0, last), np.where(stands < 0, 0, stands % picture))

    def pixels(self, film: tuple[Picture, ...]) -> np.ndarray:
        return np.stack([pixels(picture, self.data) for picture in film])

    def allowed(self, vocabulary: int) -> np.ndarray:
        tokenizer = self.tokenizer
        # The embedding may have more rows than the tokenizer has tokens.
        allowed = np.arange(vocabulary) < tokenizer.vocab_size
        allowed[sorted({tokenizer.image_id, tokenizer.pad_id, tokenizer.bos_id} - self.ends)] = False
        return allowed
