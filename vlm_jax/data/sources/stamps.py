"""Tux Paint's stamps: 1,044 cut-out photographs and drawings with a sentence each, as Debian packages them.

    apt-get install --no-install-recommends tuxpaint-stamps-default       # into /usr/share/tuxpaint/stamps

Beside NAME.png stands NAME.txt: a line of English, then other languages. Mirrored doubles and plain letters are left out, and
SVG drawings, which Pillow does not read. Held out are a quarter of the captions, or whole categories (folders): none of their
captions is in training.
"""

from __future__ import annotations

from pathlib import Path

from vlm_jax.config import DataConfig
from vlm_jax.config.data import StampsConfig
from vlm_jax.data.captioned import Captioned, CaptionedSource, held_out_quarter
from vlm_jax.data.example import SOURCES, Split
from vlm_jax.errors import DataError
from vlm_jax.files import read_regular

LEFT_OUT = ("_mirror", "symbols/alphabets")  # in the path


class StampsSource(CaptionedSource):
    """One example a picture, whose answer is its caption."""

    def __init__(self, folder: str | Path, split: Split, held_out: tuple[str, ...] = ()) -> None:
        """
        Args:
          held_out: categories; (): a quarter of the captions.

        Raises:
          DataError: no stamps there; the message says how to install them. Or no such category.
        """
        root = Path(folder).expanduser()
        captions = {path: _caption(path.with_suffix(".txt")) for path in _pictures(root)}
        captions = {path: caption for path, caption in captions.items() if caption}
        if not captions:
            raise DataError(
                f"data.source.folder={folder}: no stamps (NAME.png beside NAME.txt) are there: install Debian's "
                "tuxpaint-stamps-default, or unpack it with dpkg-deb -x and name its folder"
            )
        category = {path: path.relative_to(root).parts[0] for path in captions}
        if unknown := set(held_out) - set(category.values()):
            known = ", ".join(sorted(set(category.values())))
            raise DataError(f"data.source.held_out: there is no category {min(unknown)!r}; there are {known}")
        quarter = set() if held_out else held_out_quarter(set(captions.values()))
        tested = [path for path, caption in captions.items() if category[path] in held_out or caption in quarter]
        unseen = {captions[path] for path in tested}
        # A picture of another category that has one of these captions is in neither split.
        chosen = tested if split == "eval" else [path for path, caption in captions.items() if caption not in unseen]
        super().__init__("stamps", (Captioned(str(path.relative_to(root)), path, captions[path]) for path in chosen))


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


@SOURCES.add(StampsConfig)
def open_stamps(config: DataConfig, split: Split) -> StampsSource:
    return StampsSource(config.source.folder, split, config.source.held_out)
