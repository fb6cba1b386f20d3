"""IDEFICS' processing (transformers' `IdeficsProcessor`, which needs PyTorch)."""

from __future__ import annotations

from collections.abc import Set as AbstractSet
from typing import Any

from vlm_jax.config.generation import Settings
from vlm_jax.processing.conversation import Conversation, Text
from vlm_jax.processing.media import PublishedMedia
from vlm_jax.processing.published import PublishedProcessor

IMAGE, AROUND, UTTERANCE_END = "<image>", "<fake_token_around_image>", "<end_of_utterance>"


class IdeficsProcessor(PublishedProcessor):
    """A picture is one token, with a mark on each side that neighbours share; texts lose the spaces around them.

    Nothing behind an end token sees a picture until the next one.
    """

    def __init__(self, wrapped: Any, ends: AbstractSet[int], defaults: Settings, side: int) -> None:
        self.resets_at = wrapped.tokenizer.eos_token_id
        super().__init__(wrapped, ends, defaults, media=PublishedMedia(wrapped.image_processor, side, 0), image_token=IMAGE)
        self.template = ""  # the published processor reads lists of texts and pictures
        # A checkpoint that was trained on dialogues has a mark between one text and the next.
        self._between = UTTERANCE_END if UTTERANCE_END in wrapped.tokenizer.all_special_tokens else ""

    def untemplated(self, turns: Conversation) -> str:
        if not any(turn.role == "text" for turn in turns):
            return super().untemplated(turns)
        text, before = "", None
        for part in (part for turn in turns for part in turn.content):
            if isinstance(part, Text) and isinstance(before, Text):
                text += self._between
            text += part.text.strip(" ") if isinstance(part, Text) else IMAGE
            before = part
        return text

    def finished(self, text: str) -> str:
        out, neighbours = self.tokenizer.wrapped.bos_token, False
        for number, piece in enumerate(text.split(IMAGE)):
            if number:
                out += ("" if neighbours else AROUND) + IMAGE + AROUND
                neighbours = True
            if piece:
                out += piece.strip(" ")
                neighbours = False
        return out
