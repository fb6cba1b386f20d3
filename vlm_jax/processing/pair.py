"""A picture and its caption, for two towers: pixels of the image tower's size, text by the text tower's tokenizer.

    tokens    [CLS]  a  toucan  .  [SEP]  [PAD]  [PAD]  [PAD]
    positions   0    1    2     3    4      5      6      7

A caption always takes a whole row: its padding is the tokenizer's own, as SigLIP reads it and BERT masks it
(`TextTowerConfig.pad_token`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from vlm_jax.errors import RequestError, check_text
from vlm_jax.processing.conversation import Conversation, plain_text
from vlm_jax.processing.encoder_processor import check_list
from vlm_jax.processing.layout import LEARNED, TokenizedConversation
from vlm_jax.processing.media import MediaProcessor
from vlm_jax.processing.pictures import Picture
from vlm_jax.processing.processor import Processor, Spread
from vlm_jax.processing.published import PublishedTokenizer
from vlm_jax.processing.tokenizer import TokenizerError


class PairProcessor(Processor):
    """Also what `Encoder` reads images and texts with.

    Attributes:
      length: tokens of a text.
    """

    answers, has_text = False, True

    def __init__(self, hf_tokenizer: Any, media: MediaProcessor, *, length: int, truncates: bool, blind: bool = False) -> None:
        """
        Args:
          truncates: whether captions that are longer are cut in training; else they are errors.

        Raises:
          TokenizerError: a tokenizer without a padding token.
        """
        if hf_tokenizer.pad_token_id is None:
            raise TokenizerError("the tokenizer has no padding token (pad_token of tokenizer_config.json): name another one")
        self.tokenizer = PublishedTokenizer(hf_tokenizer)
        self.length, self.truncates, self.blind = length, truncates, blind
        self.pad_id = hf_tokenizer.pad_token_id
        self.ends: set[int] = set()
        self.spread = Spread(media, image_id=-1, end_id=self.pad_id)
        self.tokens([""])  # from now on the tokenizer pads so, and its fingerprint says so

    def write(self, conversation: Conversation, *, open: bool = False) -> TokenizedConversation:
        caption = caption_of(conversation)
        if not caption:
            raise RequestError("a picture without a caption: expected a text that an assistant says, or any")
        if not self.truncates:
            found = len(self.tokenizer.hf_tokenizer(caption, truncation=False, padding=False)["input_ids"])
            if found > self.length:
                raise RequestError(
                    f"a caption of {found} tokens, and a row has data.tokens={self.length}. Raise it, or cut captions as CLIP "
                    "and SigLIP do: data.too_long=truncate"
                )
        tokens = np.append(self.tokens([caption])[0], np.int32(self.pad_id))  # the last one is never read
        return TokenizedConversation(tokens, np.full(len(tokens), LEARNED, np.uint8))

    def pixels(self, images: Sequence[Picture]) -> np.ndarray:
        """[B, height, width, 3] uint8.

        Raises:
          RequestError: no list of pictures; ImageError: one cannot be read.
        """
        check_list("images", images)
        return np.stack([self.media.pixels((image,))[0] for image in images])

    def tokens(self, texts: Sequence[str]) -> np.ndarray:
        """[texts, T] int32, cut and padded to the whole length.

        Raises:
          RequestError: `texts` is not a list of texts.
        """
        check_list("texts", texts)
        for text in texts:
            check_text("a text", text)
        options = dict(padding="max_length", truncation=True, max_length=self.length, return_tensors="np")
        return self.tokenizer.hf_tokenizer(list(texts), **options)["input_ids"].astype(np.int32)

    def fingerprint_parts(self) -> list[Any]:
        self.tokens([""])
        return [self.tokenizer.hf_tokenizer.backend_tokenizer.to_str(), self.length, self.truncates]


def caption_of(conversation: Conversation) -> str:
    """What is learned of it: the assistant's answers; where there are none, all of its text."""
    said = " ".join(turn.text.strip() for turn in conversation if turn.learn)
    return said or plain_text(conversation)


def ended(hf_tokenizer: Any) -> Any:
    """A tokenizer that puts its begin and end tokens around every text, where a text tower is trained from nothing."""
    from tokenizers.processors import TemplateProcessing

    begin, end = hf_tokenizer.bos_token, hf_tokenizer.eos_token
    special = [(token, hf_tokenizer.convert_tokens_to_ids(token)) for token in (begin, end)]
    hf_tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=f"{begin} $A {end}", special_tokens=special)
    return hf_tokenizer
