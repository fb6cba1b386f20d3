"""Emoji with their names, as npm packages them: one drawing style a package, the same names in each.

    npm pack emoji-datasource-google@16.0.0 emoji-datasource-twitter@16.0.0 && mkdir -p emoji/google emoji/twitter
    tar xzf emoji-datasource-google-*.tgz -C emoji/google && tar xzf emoji-datasource-twitter-*.tgz -C emoji/twitter

Flags, symbols and components are left out, and skin tones, which share a name. The held-out quarter is a quarter of the names:
none of them is in training, in whatever style it is drawn. `eval_folder` draws the held-out ones in another style.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from vlm_jax.config import DataConfig
from vlm_jax.config.data import EmojiConfig
from vlm_jax.data.example import SOURCES, Example, Source, Split
from vlm_jax.errors import DataError
from vlm_jax.files import JsonError, parse_json, read_regular
from vlm_jax.processing.conversation import Medium, assistant, user

LEFT_OUT = ("Flags", "Symbols", "Component")  # categories
HELD_OUT = 4  # one name of so many
SIDE = "64"  # pixels; the packages have other sizes too


class EmojiSource(Source):
    """One example an emoji, whose answer is its name."""

    def __init__(self, folder: str | Path, split: Split) -> None:
        """
        Raises:
          DataError: no emoji there; the message says how to get them.
        """
        package = Path(folder).expanduser() / "package"
        pictures = next((path / SIDE for path in sorted((package / "img").glob("*")) if (path / SIDE).is_dir()), None)
        try:
            found = parse_json(read_regular(package / "emoji.json"))
            named = [(str(one["image"]), name_of(one["name"])) for one in found if one["category"] not in LEFT_OUT]
        except (FileNotFoundError, JsonError, KeyError, TypeError) as error:
            raise DataError(
                f"data.source.folder={folder}: package/emoji.json is not there or not as npm's emoji-datasource-* has it "
                f"({error}): unpack such a package there (npm pack emoji-datasource-google, tar xzf)"
            ) from error
        if pictures is None:
            raise DataError(f"data.source.folder={folder}: no package/img/STYLE/{SIDE} is there: unpack the whole package")
        held_out = held_out_of({name for _, name in named})
        chosen = [(file, name) for file, name in named if (name in held_out) == (split == "eval")]
        self._pairs = [(pictures / file, name) for file, name in chosen if (pictures / file).is_file()]
        names = "\n".join(f"{path.parts[-3]} {path.name}\t{name}" for path, name in self._pairs)
        self.fingerprint = f"emoji {hashlib.sha256(names.encode()).hexdigest()}"

    def __len__(self) -> int:
        return len(self._pairs)

    def __getitem__(self, index: int) -> Example:
        path, name = self._pairs[index]
        conversation = (user(Medium(0)), assistant(name))
        return Example(id=f"emoji {path.parts[-3]} {path.stem}", media=((str(path),),), conversations=(conversation,))

    def check(self, conversations: int) -> None:
        """Any number is right."""


def name_of(name: str) -> str:
    """ "SLICE OF PIZZA" -> "slice of pizza"."""
    return " ".join(name.lower().split())


def held_out_of(names: set[str]) -> set[str]:
    """A quarter of them, by their hashes: the same in every style."""
    ranked = sorted(names, key=lambda name: hashlib.sha256(name.encode()).digest())
    return set(ranked[: len(ranked) // HELD_OUT])


@SOURCES.add(EmojiConfig)
def open_emoji(config: DataConfig, split: Split) -> EmojiSource:
    source = config.source
    return EmojiSource(source.eval_folder if split == "eval" and source.eval_folder else source.folder, split)
