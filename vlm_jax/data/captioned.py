"""Picture files with a caption each, and the quarter of the captions that is held out: what several sources are."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from vlm_jax.data.example import Example, Source
from vlm_jax.processing.conversation import Medium, assistant, user

HELD_OUT = 4  # one caption of so many


class Captioned(NamedTuple):
    name: str  # within its source
    path: Path
    caption: str


class CaptionedSource(Source):
    """One example a picture, whose answer is its caption."""

    def __init__(self, kind: str, pictures: Iterable[Captioned]) -> None:
        """
        Args:
          kind: of the source; the pictures' names and captions are its fingerprint, not where they lie.
        """
        self._kind, self._pictures = kind, list(pictures)
        names = "\n".join(f"{one.name}\t{one.caption}" for one in self._pictures)
        self.fingerprint = f"{kind} {hashlib.sha256(names.encode()).hexdigest()}"

    def __len__(self) -> int:
        return len(self._pictures)

    def __getitem__(self, index: int) -> Example:
        one = self._pictures[index]
        conversation = (user(Medium(0)), assistant(one.caption))
        return Example(id=f"{self._kind} {one.name}", media=((str(one.path),),), conversations=(conversation,))

    def check(self, conversations: int) -> None:
        """Any number is right."""


def held_out_quarter(captions: set[str]) -> set[str]:
    """A quarter of them, by their hashes."""
    ranked = sorted(captions, key=lambda caption: hashlib.sha256(caption.encode()).digest())
    return set(ranked[: len(ranked) // HELD_OUT])
