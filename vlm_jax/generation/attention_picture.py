"""Draws attention maps: the pictures as the model saw them, and for every word the same with what it looked at lit up."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from vlm_jax.generation.attention_map import AttentionMaps

PANEL = 256  # pixels
ACROSS = 6  # panels side by side, at least as many as there are pictures


def blend(picture: np.ndarray, heat: np.ndarray) -> np.ndarray:
    """A picture [S, S, 3] uint8 with a map [rows, columns] in 0..1 over it: [PANEL, PANEL, 3] uint8.

    Where the map is 0 the picture is dark, where it is 1 it keeps its light and is covered by the colour.
    """
    from matplotlib import colormaps

    size = (PANEL, PANEL)
    base = np.asarray(Image.fromarray(picture).resize(size, Image.Resampling.BICUBIC), np.float32) / 255
    smooth = Image.fromarray(heat.astype(np.float32)).resize(size, Image.Resampling.BICUBIC)
    level = np.clip(np.asarray(smooth), 0, 1)[..., None]
    colour = colormaps["inferno"](level[..., 0])[..., :3]
    cover = 0.6 * level
    return np.round(255 * ((1 - cover) * base * (0.35 + 0.65 * level) + cover * colour)).astype(np.uint8)


def draw(maps: AttentionMaps, path: str | Path) -> None:
    """One group of panels for the pictures alone, and one for every word; within a group a column a picture.

    A word's panels share one scale, from 0 to their brightest patch; the percentage is the picture's share of the look.
    """
    from matplotlib.figure import Figure

    columns = len(maps.pictures)
    groups = [(None, "")] + [(heat, word) for heat, word in zip(maps.maps, maps.words, strict=True)]
    across = max(1, min(ACROSS // columns, len(groups)))
    lines = -(-len(groups) // across)
    figure = Figure(figsize=(2.4 * columns * across, 2.8 * lines), layout="constrained")
    axes = figure.subplots(lines, columns * across, squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    for number, (heat, word) in enumerate(groups):
        line, place = divmod(number, across)
        for column, picture in enumerate(maps.pictures):
            axis = axes[line, place * columns + column]
            if heat is None:
                axis.imshow(picture)
                axis.set_title(f"image {column + 1}" if columns > 1 else "image", fontsize=11)
                continue
            axis.imshow(blend(picture, heat[column] / max(float(heat.max()), 1e-30)))
            share = f"  {heat[column].sum():.0%}" if columns > 1 else ""
            axis.set_title(f"{_plain(word)}{share}", fontsize=13)
    figure.savefig(path, dpi=120)


def _plain(word: str) -> str:
    """A word that matplotlib shows as it is: a dollar sign would begin a formula, and fonts have no control characters."""
    return "".join(letter if letter.isprintable() else "?" for letter in word).replace("$", r"\$")
