"""What every source gives: media and the conversations about them, before any pixel is decoded or text tokenised.

An easy-VQA picture with its questions is one example with a conversation a question::

    Example(
        id="train/7",
        media=((b"...png...",),),
        conversations=(
            (user(Medium(0), Text("what color is the shape?")), assistant("red")),
            (user(Medium(0), Text("is there a circle?")), assistant("no")),
        ),
    )

A LLaVA conversation is one with several turns; an interleaved web page one with several pictures.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Literal, Protocol

from vlm_jax.config import DataConfig
from vlm_jax.config.register import Register
from vlm_jax.processing.conversation import Conversation, Media


@dataclasses.dataclass(frozen=True, slots=True)
class Example:
    id: str  # names the example in messages: "train/7", "chats.jsonl:12"
    media: Media  # each of one picture, or of the frames of a video
    conversations: tuple[Conversation, ...]  # independent of one another; they may share media, each a range s, s + 1, ...
    pairs: bool = False  # they are pairs with the same prompt, the chosen answer first: chosen, rejected, chosen, rejected, ...


class Source(Protocol):
    """Random access to examples. It must pickle: worker processes get a copy.

    `__getitem__` takes 0..len-1, is safe to call from several threads, and raises DataError for a record it cannot give.

    Attributes:
      fingerprint: two sources of the same fingerprint give the same examples.
      members: of a mixture, its sources by name.
    """

    fingerprint: str
    members: dict[str, Source] = {}  # noqa: RUF012

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Example: ...

    def check(self, conversations: int) -> None:
        """Checks the number of conversations, if the source knows it.

        Raises:
          DataError: some are missing.
        """


Split = Literal["train", "eval"]

# By the class of `DataConfig.source`; each raises DataError where the data cannot be read.
SOURCES: Register[Callable[[DataConfig, Split], Source]] = Register("a source for the configuration", "vlm_jax.data.sources")
