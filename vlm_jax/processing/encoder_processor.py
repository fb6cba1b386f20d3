"""Images and texts for published encoders, by transformers' own processor, without PyTorch.

Pictures leave it as bytes, as in `processing/published.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vlm_jax.errors import RequestError, check_text
from vlm_jax.processing.media import picture_bytes
from vlm_jax.processing.pictures import Picture, open_picture
from vlm_jax.processing.tokenizer import TokenizerError, check_known


class EncoderProcessor:
    """Processor of an image encoder, with or without a text encoder.

    Attributes:
      hf_processor: transformers' processor, or its picture processor alone.
    """

    answers = False

    def __init__(
        self, hf_processor: Any, length: int | None = None, vocabulary: int | None = None, *, pads_to: int | None = None
    ) -> None:
        """
        Args:
          length: how many tokens a text has; None: no texts.
          vocabulary: how many tokens the text encoder knows.
          pads_to: texts are only as long as the longest of them, rounded up to a multiple of this; None: of the whole length.
        """
        self.hf_processor, self.length, self.vocabulary, self.pads_to = hf_processor, length, vocabulary, pads_to

    @property
    def has_text(self) -> bool:
        return self.length is not None

    def pixels(self, images: Sequence[Picture]) -> np.ndarray:
        """[B, height, width, 3] uint8.

        Raises:
          RequestError: no list of pictures, or the processor leaves them in different sizes; ImageError: one cannot be read.
        """
        check_list("images", images)
        processor = getattr(self.hf_processor, "image_processor", self.hf_processor)
        if not hasattr(processor, "do_normalize"):
            raise RequestError("this checkpoint only encodes texts: it has no image encoder")
        made = [picture_bytes(processor, open_picture(image))[0] for image in images]
        shapes = {one.shape for one in made}
        if len(shapes) > 1:
            sizes = ", ".join(f"{height}x{width}" for height, width, _ in sorted(shapes))
            raise RequestError(f"this checkpoint leaves pictures in their own sizes ({sizes}): give those of one size together")
        return np.stack(made)

    def tokens(self, texts: Sequence[str]) -> np.ndarray:
        """[texts, T] int32, cut and padded: to the whole length unless padding is masked, for SigLIP reads it as trained to.

        Raises:
          RequestError: there is no text encoder, or `texts` is not a list; TokenizerError: tokens that the encoder lacks.
        """
        if not self.has_text:
            raise RequestError("this checkpoint only encodes images: it has no text encoder")
        check_list("texts", texts)
        for text in texts:
            check_text("a text", text)
        tokenizer = getattr(self.hf_processor, "tokenizer", self.hf_processor)
        if tokenizer.pad_token is None:
            raise TokenizerError("the tokenizer has no padding token (pad_token of tokenizer_config.json): fetch it again")
        padding = dict(padding="longest", pad_to_multiple_of=self.pads_to) if self.pads_to else dict(padding="max_length")
        made = tokenizer(list(texts), **padding, truncation=True, max_length=self.length, return_tensors="np")
        check_known(made["input_ids"], self.vocabulary)
        return made["input_ids"].astype(np.int32)


def check_list(name: str, values: Any) -> None:
    """
    Raises:
      RequestError: a single value instead of a list, or an empty list.
    """
    if isinstance(values, str | bytes | Path):
        raise RequestError(f"{name}={values!r}: expected a list; put it in brackets")
    if len(values) == 0:
        raise RequestError(f"{name}: the list is empty")
