"""Tux Paint's stamps: 1,044 cut-out photographs and drawings with a sentence each, as Debian packages them.

    apt-get install --no-install-recommends tuxpaint-stamps-default       # into /usr/share/tuxpaint/stamps

Beside NAME.png stands NAME.txt: a line of English, then other languages. Mirrored doubles and plain letters are left out, and
SVG drawings, which Pillow does not read. The held-out quarter is a quarter of the captions: none of them is in training.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from vlm_jax.config import DataConfig
from vlm_jax.config.data import StampsConfig
from vlm_jax.data.example import SOURCES, Example, Source, Split
from vlm_jax.errors import DataError
from vlm_jax.files import read_regular
from vlm_jax.processing.conversation import Medium, assistant, user

LEFT_OUT = ("_mirror", "symbols/alphabets")  # in the path
HELD_OUT = 4  # one caption of so many


class StampsSource(Source):
    """One example a picture, whose answer is its caption."""

    def __init__(self, folder: str | Path, split: Split) -> None:
        """
        Raises:
          DataError: no stamps there; the message says how to install them.
        """
        self._folder = Path(folder).expanduser()
        captions = {path: _caption(path.with_suffix(".txt")) for path in _pictures(self._folder)}
        captions = {path: caption for path, caption in captions.items() if caption}
        if not captions:
            raise DataError(
                f"data.source.folder={folder}: no stamps (NAME.png beside NAME.txt) are there: install Debian's "
                "tuxpaint-stamps-default, or unpack it with dpkg-deb -x and name its folder"
            )
        held_out = _held_out(set(captions.values()))
        self._pairs = [(path, caption) for path, caption in captions.items() if (caption in held_out) == (split == "eval")]
        names = "\n".join(f"{path.relative_to(self._folder)}\t{caption}" for path, caption in self._pairs)
        self.fingerprint = f"stamps {hashlib.sha256(names.encode()).hexdigest()}"

    def __len__(self) -> int:
        return len(self._pairs)

    def __getitem__(self, index: int) -> Example:
        path, caption = self._pairs[index]
        conversation = (user(Medium(0)), assistant(caption))
        return Example(id=f"stamps {path.relative_to(self._folder)}", media=((str(path),),), conversations=(conversation,))

    def check(self, conversations: int) -> None:
        """Any number is right."""


def _pictures(folder: Path) -> list[Path]:
    """In an order that is the same on every machine."""
    found = [path for path in folder.rglob("*.png") if not any(part in path.as_posix() for part in LEFT_OUT)]
    return sorted(found, key=lambda path: path.relative_to(folder).as_posix())


def _caption(file: Path) -> str:
    """The first line; "" where there is none."""
    try:
        return read_regular(file).decode(errors="replace").partition("\n")[0].strip()
    except FileNotFoundError:
        return ""


def _held_out(captions: set[str]) -> set[str]:
    """A quarter of them, by their hashes."""
    ranked = sorted(captions, key=lambda caption: hashlib.sha256(caption.encode()).digest())
    return set(ranked[: len(ranked) // HELD_OUT])


@SOURCES.add(StampsConfig)
def open_stamps(config: DataConfig, split: Split) -> StampsSource:
    return StampsSource(config.source.folder, split)
