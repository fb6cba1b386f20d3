"""Prints one training example as the model reads it: tokens, loss mask, visual tokens, cross-attention.

    python -m vlm_jax.show --config=configs/flamingo_easyvqa.py --example=7
    python -m vlm_jax.show --config=configs/finetune.py:FOLDER --config.data.source.train=mine.jsonl --image=tiles.png

Green tokens have a loss, the others do not. In a prefix-LM, attention within the prompt is bidirectional. `--json` prints one
line of JSON: `tokens`, `learned` (a boolean per token), `text`, and `ends`: positions after which the model learns to stop
although the text continues.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from absl import app, flags, logging
from ml_collections import config_flags
from PIL import Image, ImageDraw

from vlm_jax.config import RunConfig
from vlm_jax.config_dict import from_config_dict
from vlm_jax.data.example import Example, Source
from vlm_jax.errors import DataError, counted
from vlm_jax.processing.conversation import media_of
from vlm_jax.processing.layout import ENDS, NEWLINE, Layout, TokenizedConversation
from vlm_jax.processing.pictures import Size, picture_name, picture_size
from vlm_jax.processing.processor import Processor

GAP, CAPTION = 6, 14  # pixels around a tile, and of the line above a picture's tiles


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shown:
    """An example and everything that is printed about it."""

    example: Example
    processor: Processor
    sizes: list[Size]  # of all its media
    places: list[int]  # the media of the conversation, in the order of their places
    written: TokenizedConversation
    layout: Layout

    @classmethod
    def of(cls, source: Source, processor: Processor, number: int, conversation: int = 0) -> Shown:
        """
        Raises:
          DataError: there is no such example or conversation, or it cannot be read.
        """
        if not 0 <= number < len(source):
            raise DataError(f"--example={number}: there are {len(source)}, counted from 0")
        example = source[number]
        if not 0 <= conversation < len(example.conversations):
            raise DataError(f"--conversation={conversation}: {example.id} has {len(example.conversations)}, counted from 0")
        turns = example.conversations[conversation]
        sizes = [picture_size(medium[0]) for medium in example.media]
        written = processor.write(turns)
        places = media_of(turns)
        return cls(
            example=example,
            processor=processor,
            sizes=sizes,
            places=places,
            written=written,
            layout=processor.spread(written, [sizes[place] for place in places]),
        )

    @property
    def as_json(self) -> str:
        """One line."""
        layout = self.layout
        return json.dumps(
            {
                "example": self.example.id,
                "tokens": layout.tokens.tolist(),
                "learned": layout.learned.tolist(),
                "ends": np.flatnonzero(layout.flags & ENDS).tolist(),
                "text": self.processor.tokenizer.decode(self.written.tokens.tolist()),
            },
            ensure_ascii=False,
        )

    def print(self) -> None:
        """To the terminal, coloured."""
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        console, layout = Console(highlight=False), self.layout
        learned = int(layout.learned.sum()) + int(((layout.flags & ENDS) > 0).sum())
        console.print(f"{self.example.id}: {len(layout.tokens):,} tokens, {learned:,} learned", style="bold")
        text = Text()
        for piece, style in self._pieces():
            text.append(piece, style)
        console.print(text)
        media = self.processor.media
        for number, (medium, size) in enumerate(zip(self.example.media, self.sizes, strict=True), 1):
            tokens = sum(map(len, media.runs(size))) if media.tile_tokens else 0
            how = f"{tokens:,} visual tokens in the sequence" if tokens else "read by cross-attention"
            name = picture_name(medium[0]) + (f" and {len(medium) - 1} more frames" if len(medium) > 1 else "")
            console.print(f"picture {number}: {name}, {size[0]}x{size[1]}, {counted(media.tiles(size), 'tile')}, {how}")
        table = Table("places", "tokens", "what", "learned", "prompt", "cross-attention to")
        for begin, end in self._runs():
            last = int(layout.media_last[begin])
            newlines = int((layout.visual[begin:end] == NEWLINE).sum())
            what = "visual tokens" + (f", {newlines} newlines" if newlines else "") if layout.visual[begin] else "text"
            sees = "" if media.tile_tokens or not self.sizes else f"picture {last}" if last else "none"
            yes = lambda value: "yes" if value else ""
            flags = (yes(layout.learned[begin]), yes(layout.prefix[begin]))
            table.add_row(f"{begin}..{end - 1}" if end - begin > 1 else f"{begin}", str(end - begin), what, *flags, sees)
        console.print(table)

    def _pieces(self) -> list[tuple[str, str]]:
        """The compact tokens as text, one piece per run of the same colour."""
        written, spread = self.written, self.processor.spread
        decoded = lambda end: self.processor.tokenizer.decode(written.tokens[:end].tolist())
        # A tokenizer may leave away the space a text begins with, so that a piece is what it adds.
        text = lambda begin, end: decoded(end)[len(decoded(begin)) :]
        runs = iter([run for place in self.places for run in self.processor.media.runs(self.sizes[place])])
        style = lambda place: "bold green" if written.flags[place] & 1 else "dim"
        pieces: list[tuple[str, str]] = []
        begin = 0
        for place in range(len(written.tokens) + 1):
            done = place == len(written.tokens)
            is_image = not done and written.tokens[place] == spread.image_id
            if place > begin and (done or is_image or style(place) != style(begin)):
                pieces.append((text(begin, place), style(begin)))
                begin = place
            if is_image:
                count = len(next(runs, ())) if self.processor.media.tile_tokens else 1
                pieces.append((f"[<image>{f' x {count}' if count > 1 else ''}]", "bold cyan"))
                begin = place + 1
            elif not done and written.flags[place] & ENDS:
                pieces.append((text(begin, place + 1), style(begin)))
                pieces.append((f"({self.processor.tokenizer.decode([spread.end_id])} is learned here)", "green"))
                begin = place + 1
        return pieces

    def _runs(self) -> list[tuple[int, int]]:
        """Ranges of consecutive tokens with the same properties."""
        layout = self.layout
        properties = np.stack([layout.visual != 0, layout.learned, layout.prefix, layout.media_last])
        changes = np.flatnonzero((properties[:, 1:] != properties[:, :-1]).any(axis=0)) + 1
        bounds = [0, *changes.tolist(), len(layout.tokens)]
        return list(itertools.pairwise(bounds))

    def draw(self, path: Path) -> None:
        """Writes the tiles of all its pictures, a row a picture, as the vision encoder gets them.

        Raises:
          DataError: the example has no picture.
        """
        rows = [self.processor.media.pixels(medium) for medium in self.example.media]
        if not rows:
            raise DataError(f"--image: {self.example.id} has no picture")
        captions = [
            f"picture {number}: {height}x{width}, {counted(len(tiles), 'tile')} of {tiles[0].shape[0]}x{tiles[0].shape[1]}"
            for number, (tiles, (height, width)) in enumerate(zip(rows, self.sizes, strict=True), 1)
        ]
        widths = [sum(tile.shape[1] + GAP for tile in tiles) + GAP for tiles in rows]
        heights = [max(tile.shape[0] for tile in tiles) + CAPTION + 2 * GAP for tiles in rows]
        texts = [int(ImageDraw.Draw(Image.new("RGB", (1, 1))).textlength(caption)) + 2 * GAP for caption in captions]
        canvas = Image.new("RGB", (max(*widths, *texts), sum(heights)), "white")
        pen, top = ImageDraw.Draw(canvas), 0
        for tiles, caption, height in zip(rows, captions, heights, strict=True):
            pen.text((GAP, top + 2), caption, fill="black")
            left = GAP
            for tile in tiles:
                canvas.paste(Image.fromarray(tile), (left, top + CAPTION + GAP))
                left += tile.shape[1] + GAP
            top += height
        canvas.save(path)


def main(argv: list[str]) -> int:
    from vlm_jax.data.pipeline import build_source
    from vlm_jax.training.processors import build_processor, run_processor

    if len(argv) > 1:
        sys.exit(f"vlm_jax.show: unknown arguments {argv[1:]}; see --help")
    values: Any = flags.FLAGS
    logging.set_verbosity(logging.WARNING)
    config = from_config_dict(RunConfig, values.config)
    try:
        source = build_source(config.data, values.split)
        if values.workdir:
            processor = run_processor(config.data, Path(values.workdir).expanduser())
        else:
            texts = source if values.split == "train" else build_source(config.data, "train")
            with tempfile.TemporaryDirectory() as folder:
                processor = build_processor(config.data, texts, Path(folder), pickles=config.pickles)
        shown = Shown.of(source, processor, values.example, values.conversation)
        if values.image:
            shown.draw(Path(values.image))
    except (ValueError, OSError) as error:
        print(f"vlm_jax.show: {error}", file=sys.stderr)
        return 1
    if values.json:
        print(shown.as_json)
    else:
        shown.print()
    return 0


def define_flags() -> None:
    config_flags.DEFINE_config_file("config", None, "The recipe: a file in configs/.", lock_config=True)
    flags.DEFINE_string("workdir", None, "A run whose tokenizer or processor is used (default: what a new run would use).")
    flags.DEFINE_enum("split", "train", ["train", "eval"], "Which of the two sets.")
    flags.DEFINE_integer("example", 0, "Which example, counted from 0.")
    flags.DEFINE_integer("conversation", 0, "Which of its conversations, counted from 0.")
    flags.DEFINE_string("image", None, "A PNG file to write the tiles to.")
    flags.DEFINE_bool("json", False, "Print one line of JSON instead.")
    flags.mark_flag_as_required("config")


if __name__ == "__main__":
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # silences transformers' "PyTorch was not found"
    define_flags()
    app.run(main)
