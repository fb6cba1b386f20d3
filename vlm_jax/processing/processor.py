"""A conversation and its media -> tokens, loss mask, visual tokens in their places, pixels.

Training and inference use the same calls: `write` tokenises a conversation once, `spread` puts the visual
tokens into their places, `media.pixels` makes the tiles. A prompt is the same call with the last answer left open.

    layout = processor.lay_out(conversation, sizes)               # to train on
    layout = processor.lay_out(conversation, sizes, open=True)    # to be answered

A run's recipe (`recipe.py`) and every kind of published checkpoint (`published.py`) have a processor each.

Axis letter: V vocabulary.
"""

from __future__ import annotations

import abc
import copy
import dataclasses
import hashlib
from typing import Any, Protocol

import numpy as np

from vlm_jax.config.generation import Settings
from vlm_jax.processing.conversation import Conversation
from vlm_jax.processing.layout import Layout, TokenizedConversation, spread
from vlm_jax.processing.media import BlankMedia, MediaProcessor
from vlm_jax.processing.pictures import Size

LANGUAGE_ONLY = "the request has pictures, but this model is a language model alone: leave them out"  # an error
VERSION = 1  # of what processors make: token stores of another version are not read


class Codec(Protocol):
    """Text <-> ids, nothing added in front or behind.

    Attributes:
      vocab_size: one more than the greatest id.
    """

    vocab_size: int

    def encode(self, text: str) -> list[int]: ...

    def decode(self, ids: list[int], special: bool = True) -> str: ...


@dataclasses.dataclass(frozen=True)
class Spread:
    """From written conversations to layouts. It pickles, and holds no tokenizer: data workers have it."""

    media: MediaProcessor
    image_id: int  # the token that stands for visual tokens
    end_id: int  # the token that ends a learned answer
    resets_at: int | None = None  # a token after which no medium is seen until the next one

    def __call__(self, written: TokenizedConversation, sizes: list[Size]) -> Layout:
        """
        Args:
          sizes: of the conversation's media, in the order of their places.
        """
        return spread(
            written,
            image_id=self.image_id,
            runs=[self.media.runs(size) for size in sizes],
            tiles=[self.media.tiles(size) for size in sizes],
            tile_tokens=self.media.tile_tokens,
            resets_at=self.resets_at,
        )


class Processor(abc.ABC):
    """
    Attributes:
      tokenizer: text <-> ids.
      spread: from written conversations to layouts; `media` is its picture half.
      ends: tokens that end an answer; pad_id: what fills up rows.
      defaults: the generation settings that a checkpoint asks for.
      blind: whether every picture is blanked, in a control experiment.
      answers: whether the model generates text; `EncoderProcessor`'s do not.
    """

    tokenizer: Codec
    spread: Spread
    ends: set[int]
    pad_id: int
    defaults = Settings()
    blind = False
    answers = True

    @property
    def media(self) -> MediaProcessor:
        return self.spread.media

    @abc.abstractmethod
    def write(self, conversation: Conversation, *, open: bool = False) -> TokenizedConversation:
        """The conversation tokenised once.

        Args:
          open: leave off before the next answer, to be answered; else the last answer is closed with its end token.

        Raises:
          RequestError: a conversation that the template refuses, or that it changes so that what is learned cannot be known.
        """

    def lay_out(self, conversation: Conversation, sizes: list[Size], *, open: bool = False) -> Layout:
        """`write`, with the visual tokens of pictures of these sizes in their places."""
        return self.spread(self.write(conversation, open=open), sizes)

    def allowed(self, vocabulary: int) -> np.ndarray:
        """[V] bool, what may be generated."""
        return np.ones(vocabulary, bool)

    @abc.abstractmethod
    def fingerprint_parts(self) -> list[Any]:
        """Everything that its tokens and layouts depend on."""

    @property
    def fingerprint(self) -> str:
        """Two processors with the same fingerprint tokenise every conversation the same way."""
        parts = [VERSION, type(self).__name__, sorted(self.ends), repr(self.spread), *self.fingerprint_parts()]
        return hashlib.sha256("\0".join(map(str, parts)).encode()).hexdigest()


def blanked(processor: Processor) -> Processor:
    """The same processor with every picture grey."""
    blind = copy.copy(processor)
    blind.spread = dataclasses.replace(processor.spread, media=BlankMedia(processor.media))
    blind.blind = True
    return blind
