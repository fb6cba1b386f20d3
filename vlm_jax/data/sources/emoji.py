"""Emoji with their names, as npm packages them: one drawing style a package, the same names in each.

    npm pack emoji-datasource-google@16.0.0 emoji-datasource-twitter@16.0.0 && mkdir -p emoji/google emoji/twitter
    tar xzf emoji-datasource-google-*.tgz -C emoji/google && tar xzf emoji-datasource-twitter-*.tgz -C emoji/twitter

Flags, symbols and components are left out, and skin tones, which share a name. The held-out quarter is a quarter of the names:
none of them is in training, in whatever style it is drawn. `eval_folder` draws the held-out ones in another style.
"""

from __future__ import annotations

from pathlib import Path

from vlm_jax.config import DataConfig
from vlm_jax.config.data import EmojiConfig
from vlm_jax.data.captioned import Captioned, CaptionedSource, held_out_quarter
from vlm_jax.data.example import SOURCES, Split
from vlm_jax.errors import DataError
from vlm_jax.files import JsonError, parse_json, read_regular

LEFT_OUT = ("Flags", "Symbols", "Component")  # categories
SIDE = "64"  # pixels; the packages have other sizes too


class EmojiSource(CaptionedSource):
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
        held_out = held_out_quarter({name for _, name in named})
        chosen = [(pictures / file, name) for file, name in named if (name in held_out) == (split == "eval")]
        style = pictures.parent.name
        super().__init__("emoji", (Captioned(f"{style} {path.stem}", path, name) for path, name in chosen if path.is_file()))


def name_of(name: str) -> str:
    """ "SLICE OF PIZZA" -> "slice of pizza"."""
    return " ".join(name.lower().split())


@SOURCES.add(EmojiConfig)
def open_emoji(config: DataConfig, split: Split) -> EmojiSource:
    source = config.source
    return EmojiSource(source.eval_folder if split == "eval" and source.eval_folder else source.folder, split)
