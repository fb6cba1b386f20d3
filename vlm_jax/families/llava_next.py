"""LLaVA-NeXT (Liu et al. 2024): `LlavaNextForConditionalGeneration`, LLaVA's parameters and pictures of any resolution.

A picture becomes a small copy of itself and the tiles of a larger one. In the text the copy comes first, then the rows of
patches across all tiles, without the rows and columns that only padding is in, a newline token after every row.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from vlm_jax.config import ModelConfig
from vlm_jax.errors import counted
from vlm_jax.families import llava
from vlm_jax.interop.files.source import PublishedError
from vlm_jax.interop.published import Family
from vlm_jax.interop.register import FAMILIES
from vlm_jax.processing.layout import NEWLINE, Runs
from vlm_jax.processing.media import PublishedMedia
from vlm_jax.processing.pictures import Size
from vlm_jax.processing.published import PublishedProcessor


@dataclasses.dataclass(frozen=True)
class AnyresMedia(PublishedMedia):
    """
    Attributes:
      pinpoints: (height, width) that pictures may be resized to, multiples of `side`.
      patch: pixels of a patch's side.
    """

    pinpoints: tuple[Size, ...] = ()
    patch: int = 14

    def runs(self, size: Size) -> Runs:
        return (anyres_places(size, self.pinpoints, self.side, self.patch),)

    def tiles(self, size: Size) -> int:
        height, width = best_resolution(size, self.pinpoints)
        return 1 + (height // self.side) * (width // self.side)


def best_resolution(size: Size, pinpoints: Sequence[Size]) -> Size:
    """The one that shows most of the picture's pixels, and of these the one that wastes least."""

    def worth(resolution: Size) -> tuple[int, int]:
        scale = min(resolution[1] / size[1], resolution[0] / size[0])
        shown = min(int(size[1] * scale) * int(size[0] * scale), size[0] * size[1])
        return shown, shown - resolution[0] * resolution[1]

    return max(pinpoints, key=worth)


def anyres_places(size: Size, pinpoints: Sequence[Size], side: int, patch: int) -> np.ndarray:
    """[visual tokens] int32: which patch each is, counted through the small copy and then tile after tile; or `NEWLINE`.

    Args:
      size: of the picture as it is.
      pinpoints: (height, width) that it may be resized to, multiples of `side`.
      side: S.
      patch: pixels of a patch's side.
    """
    height, width = best_resolution(size, pinpoints)
    down, across, across_tile = height // side, width // side, side // patch
    tiles = np.arange(down * across * across_tile**2).reshape(down, across, across_tile, across_tile)
    grid = tiles.transpose(0, 2, 1, 3).reshape(down * across_tile, across * across_tile) + across_tile**2
    grid = grid[_inside(size, grid.shape)]
    rows = np.concatenate([grid, np.full((len(grid), 1), NEWLINE)], axis=1)
    return np.concatenate([np.arange(across_tile**2), rows.reshape(-1)]).astype(np.int32)


def _inside(size: Size, grid: Size) -> tuple[slice, slice]:
    """The rows and columns of the grid in which there is some of the picture, which was centred in it."""
    # Rounded as transformers does: what is an integer up to the error of a float stays one.
    if size[1] / size[0] > grid[1] / grid[0]:
        padding = (grid[0] - int(round(size[0] * (grid[1] / size[1]), 7))) // 2
        return slice(padding, grid[0] - padding), slice(None)
    padding = (grid[1] - int(round(size[1] * (grid[0] / size[0]), 7))) // 2
    return slice(None), slice(padding, grid[1] - padding)


def config_from_hf(config: Any) -> ModelConfig:
    """`LlavaNextConfig` -> ours.

    Raises:
      ValueError: as `llava.build`; or features that are not the patches', of which the tiles of a picture are laid out.
    """
    ours = llava.config_from_hf(config)
    if extra := ours.vision.front_features:
        raise ValueError(
            f"vision_feature_select_strategy={config.vision_feature_select_strategy!r} leaves {counted(extra, 'feature')} of "
            f"{config.vision_config.model_type!r} that no patch has made (class token, registers), and tiles are put together "
            "from patches alone, in transformers too: only 'default', and no registers, is implemented"
        )
    return ours


def _processor(config: ModelConfig, hf_config: Any, hf_processor: Any, *rest: Any) -> PublishedProcessor:
    vision, pinpoints = config.vision, tuple((height, width) for height, width in hf_config.image_grid_pinpoints)
    made = sorted(map(tuple, hf_processor.image_processor.image_grid_pinpoints))
    if made != sorted(pinpoints) or any(side % vision.image_size for pair in pinpoints for side in pair):
        raise PublishedError(
            f"image_grid_pinpoints={list(pinpoints)} in config.json, {made} in the picture processor's: expected the same, "
            f"multiples of vision_config.image_size={vision.image_size}"
        )
    sizes = (vision.image_size, vision.frame_features)
    media = AnyresMedia(hf_processor.image_processor, *sizes, pinpoints=pinpoints, patch=vision.patch_size)
    return PublishedProcessor(hf_processor, *rest, media=media, image_token=hf_processor.image_token)


FAMILIES.add("llava_next")(Family(config_from_hf, llava.table, _processor))
