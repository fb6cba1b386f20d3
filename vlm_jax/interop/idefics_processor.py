"""IDEFICS' processing (transformers' `IdeficsProcessor`, which needs PyTorch): which picture each token sees.

Axis letter: T prompt tokens.
"""

from __future__ import annotations

import numpy as np

from vlm_jax.data.example import Text
from vlm_jax.generation.processor import Layout
from vlm_jax.generation.request import Picture, Request, Settings
from vlm_jax.interop.processor import Pictures, PublishedProcessor, Wrapped

IMAGE, AROUND, UTTERANCE_END = "<image>", "<fake_token_around_image>", "<end_of_utterance>"


class IdeficsProcessor(PublishedProcessor):
    """A picture is one token, with a mark on each side that neighbours share; texts lose the spaces around them."""

    def __init__(self, wrapped: Wrapped, ends: set[int], defaults: Settings) -> None:
        super().__init__(wrapped, ends, defaults, Pictures(IMAGE, lambda size: np.zeros(1, np.int32)))
        tokenizer = self.tokenizer.wrapped
        self._image, self._end = (tokenizer.convert_tokens_to_ids(name) for name in (IMAGE, tokenizer.eos_token))
        # A checkpoint that was trained on dialogues has a mark between one speaker's text and the next one's.
        self._between = UTTERANCE_END if UTTERANCE_END in tokenizer.all_special_tokens else ""

    def lay_out(self, request: Request) -> Layout:
        text, before = self.tokenizer.wrapped.bos_token, None
        for part in request.parts:
            if not isinstance(part, Text):
                neighbours = before is not None and not isinstance(before, Text)
                text += ("" if neighbours else AROUND) + IMAGE + AROUND
            elif part.text:
                text += (self._between if isinstance(before, Text) else "") + part.text.strip(" ")
            else:
                continue
            before = part
        tokens = np.asarray(self.tokenizer.encode(text), np.int32)
        seen, nothing = last_image(tokens, self._image, self._end), np.zeros_like(tokens)
        return Layout(tokens, seen, seen, nothing, nothing)

    def pixels(self, film: tuple[Picture, ...]) -> np.ndarray:
        made = self.wrapped.image_processor(self._one(film), do_rescale=False, do_normalize=False, return_tensors="np")
        return np.asarray(made).transpose(0, 2, 3, 1)


def last_image(tokens: np.ndarray, image: int, end: int) -> np.ndarray:
    """[T] int32, the last picture so far, from 1; 0 before the first, and after an end token until the next."""
    seen, count, ended = np.zeros_like(tokens), 0, False
    for place, token in enumerate(tokens):
        if token == image:
            count, ended = count + 1, False
        seen[place] = 0 if ended else count
        ended = ended or token == end
    return seen
