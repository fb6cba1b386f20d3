"""Draws attention maps: the pictures as the model saw them, and for every word where it looked more or less than evenly."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
from PIL import Image

PANEL = 256  # pixels
LEAST, MOST = 0.1, 3.0  # doublings of an even look that full colour stands for
ACROSS = 6  # panels side by side, at least as many as there are pictures


@dataclasses.dataclass(frozen=True)
class AttentionMaps:
    """Where each word looked; only pictures that are there have a column."""

    words: list[str]
    maps: np.ndarray  # [words, columns, rows of patches, columns of patches]; a word's sum is 1, or 0 if it sees no image
    pictures: np.ndarray  # [columns, side, side, 3] uint8, as the model saw them

    def save(self, path: str | Path) -> None:
        """Draws one panel a word and picture."""
        draw(self, path)


def against_even(maps: np.ndarray) -> np.ndarray:
    """[words, columns, rows, columns of patches] -> doublings of an even look over the pictures the word sees, within `MOST`.

    An even look is 0, twice as much 1, half as much -1.
    """
    seen = (maps.sum(axis=(2, 3)) > 0).sum(axis=1) * maps[0, 0].size
    return np.clip(np.log2(np.maximum(maps * seen[:, None, None, None], 2.0**-MOST)), -MOST, MOST)


def blend(picture: np.ndarray, level: np.ndarray | None) -> np.ndarray:
    """A picture [side, side, 3] uint8, grey, under a map [rows, columns] in -1..1: [PANEL, PANEL, 3] uint8.

    Red is more than an even look, blue less. A picture that the word does not see (None) is dark.
    """
    from matplotlib import colormaps

    size = (PANEL, PANEL)
    grey = Image.fromarray(picture).convert("L").resize(size, Image.Resampling.BICUBIC)
    base = np.asarray(grey, np.float32)[..., None] / 255
    if level is None:
        return np.repeat(np.round(255 * 0.25 * base), 3, axis=-1).astype(np.uint8)
    smooth = np.asarray(Image.fromarray(level.astype(np.float32)).resize(size, Image.Resampling.BICUBIC))
    smooth = np.clip(smooth, -1, 1)
    cover = 0.8 * np.abs(smooth)[..., None]
    colour = colormaps["coolwarm"](0.5 + 0.5 * smooth)[..., :3]
    return np.round(255 * ((1 - cover) * base + cover * colour)).astype(np.uint8)


def draw(maps: AttentionMaps, path: str | Path) -> None:
    """One group of panels for the pictures alone, and one for every word; within a group a column a picture.

    Full colour is the strongest look among all panels, and the bar tells how strong that is. The percentage is the
    picture's share of the word's look.
    """
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure

    columns = len(maps.pictures)
    levels = against_even(maps.maps) if len(maps.words) else maps.maps
    visible = levels[maps.maps.any(axis=(2, 3))] if len(maps.words) else levels
    span = max(float(np.abs(visible).max(initial=0.0)), LEAST)
    groups = [None, *range(len(maps.words))]
    across = max(1, min(ACROSS // columns, len(groups)))
    lines = -(-len(groups) // across)
    figure = Figure(figsize=(2.4 * columns * across, 2.8 * lines), layout="constrained")
    axes = figure.subplots(lines, columns * across, squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    for place, word in enumerate(groups):
        line, first = divmod(place, across)
        for column, picture in enumerate(maps.pictures):
            axis = axes[line, first * columns + column]
            if word is None:
                axis.imshow(picture)
                axis.set_title(f"image {column + 1}" if columns > 1 else "image", fontsize=11)
                continue
            seen = maps.maps[word, column].any()
            axis.imshow(blend(picture, levels[word, column] / span if seen else None))
            share = f"  {maps.maps[word, column].sum():.0%}" if columns > 1 else ""
            axis.set_title(f"{_plain(maps.words[word])}{share}", fontsize=13)
    scale = ScalarMappable(Normalize(-span, span), "coolwarm")
    bar = figure.colorbar(scale, ax=axes, ticks=[-span, 0, span], fraction=0.02)
    bar.ax.set_yticklabels([f"{2**-span:.2g} x", "even", f"{2**span:.2g} x"])
    figure.savefig(path, dpi=120, bbox_inches="tight")


def _plain(word: str) -> str:
    """A word that matplotlib shows as it is: a dollar sign would begin a formula, and fonts have no control characters."""
    return "".join(letter if letter.isprintable() else "?" for letter in word).replace("$", r"\$")
