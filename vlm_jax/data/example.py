"""What every source gives: some pictures, and the texts that speak of them, before any pixel is decoded or text tokenised.

An easy-VQA picture with its questions is one example with a sequence a question::

    Example(
        id="train/7",
        images=((b"...png...",),),
        sequences=(
            (ImageAt(0), Text("what color is the shape?", learn=False), Text(" red", learn=True)),
            (ImageAt(0), Text("is there a circle?", learn=False), Text(" no", learn=True)),
        ),
    )

A LLaVA conversation is one sequence with several turns; an interleaved web page one with several images.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Protocol


class DataError(ValueError):
    """Something is wrong with the user's data; the message names the file and the line."""


@dataclasses.dataclass(frozen=True, slots=True)
class Text:
    text: str
    learn: bool  # whether the model learns to say it, or only reads it


@dataclasses.dataclass(frozen=True, slots=True)
class ImageAt:
    slot: int  # an index of `Example.images`


Frame = str | Path | bytes  # what `read_image` takes
Sequence = tuple[Text | ImageAt, ...]  # the slots it names are consecutive: s, s + 1, ...


@dataclasses.dataclass(frozen=True, slots=True)
class Example:
    id: str  # names the example in messages: "train/7", "chats.jsonl:12"
    images: tuple[tuple[Frame, ...], ...]  # slots, each of one frame or several
    sequences: tuple[Sequence, ...]  # independent of one another; they may share images


class Source(Protocol):
    """Random access to examples. It must pickle: worker processes get a copy.

    `__getitem__` takes 0..len-1, is safe to call from several threads, and raises DataError for a record it cannot give.
    """

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Example: ...
