"""Pictures and videos -> tiles of pixels, and how many visual tokens stand for them.

It is the half of a processor that data workers get a copy of: no tokenizer is in it.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, Literal, Protocol

import numpy as np

from vlm_jax.errors import RequestError
from vlm_jax.processing.layout import Runs
from vlm_jax.processing.pictures import (
    GREY,
    ImageError,
    Picture,
    Size,
    blank_image,
    fit_image,
    open_picture,
    picture_name,
    read_image,
)

Medium = tuple[Picture, ...]


class MediaProcessor(Protocol):
    """
    Attributes:
      side: S.
      tile_tokens: R; 0: the model reads its media by cross-attention, and one token says where each stands.
      reads_videos: whether a medium may have several frames.
    """

    @property
    def reads_videos(self) -> bool: ...

    side: int
    tile_tokens: int

    def runs(self, size: Size) -> Runs:
        """For each `<image>` written for a picture of this size, the visual tokens in its place, counted from 0."""
        ...

    def tiles(self, size: Size) -> int:
        """Number of tiles of an image of this size; with cross-attention, 1 per medium."""
        ...

    def pixels(self, medium: Medium) -> list[np.ndarray]:
        """The tiles of a picture, or the frames of a video: [height, width, 3] uint8 each.

        Raises:
          ImageError: one cannot be read; RequestError: a video, where only pictures are read.
        """
        ...


@dataclasses.dataclass(frozen=True)
class FittedMedia:
    """Every picture is fitted to one square, as the recipes of this repository have it."""

    side: int
    fit: Literal["stretch", "pad", "crop"]
    tile_tokens: int
    blank: bool = False  # the control experiment: every picture grey

    @property
    def reads_videos(self) -> bool:
        return not self.tile_tokens

    def runs(self, size: Size) -> Runs:
        return (np.arange(self.tile_tokens),)

    def tiles(self, size: Size) -> int:
        return 1

    def pixels(self, medium: Medium) -> list[np.ndarray]:
        if self.tile_tokens and len(medium) != 1:
            raise RequestError(
                f"a video of {len(medium)} pictures: a model with visual tokens in the sequence reads single pictures. "
                "Give them one by one"
            )
        return [self._fitted(picture) for picture in medium]

    def _fitted(self, picture: Picture) -> np.ndarray:
        if self.blank:
            return blank_image(self.side)
        try:
            return fit_image(read_image(picture), self.side, self.fit)
        except ImageError as error:
            named = str(error).startswith("picture ")
            raise error if named else ImageError(f"picture {picture_name(picture)}: {error}") from None


@dataclasses.dataclass(frozen=True)
class PublishedMedia:
    """A published checkpoint's own picture processor; each picture is one tile of R visual tokens.

    Attributes:
      wrapped: transformers' picture processor, or another that is called like it, as `families.open_clip.OpenClipTransform`.
      background: the colour with which pictures are first padded to squares, centred, as LLaVA-1.5 was evaluated by its
        authors; None: they are not, as transformers has it.
    """

    wrapped: Any
    side: int
    tile_tokens: int
    background: tuple[int, int, int] | None = None
    reads_videos: ClassVar[bool] = False

    def runs(self, size: Size) -> Runs:
        return (np.arange(max(self.tile_tokens, 1)),)

    def tiles(self, size: Size) -> int:
        return 1

    def pixels(self, medium: Medium) -> list[np.ndarray]:
        return self.tiled(medium[0], self.opened(medium))

    def tiled(self, picture: Picture, opened: Any, **settings: Any) -> list[np.ndarray]:
        """`picture_bytes`, with the picture's name in its errors."""
        try:
            return picture_bytes(self.wrapped, opened, **settings)
        except ImageError as error:
            raise ImageError(f"picture {picture_name(picture)}: {error}") from error

    def opened(self, medium: Medium) -> Any:
        """The picture as transformers' processor takes it: upright, in its own mode."""
        if len(medium) != 1:
            raise RequestError(
                f"a video of {len(medium)} pictures: this checkpoint reads single pictures. Give them one by one"
            )
        picture = open_picture(medium[0])
        return picture if self.background is None else squared(read_image(picture), self.background)


@dataclasses.dataclass(frozen=True)
class BlankMedia:
    """Another one's tiles, all of them grey: the control experiment, for any processor."""

    wrapped: MediaProcessor

    @property
    def reads_videos(self) -> bool:
        return self.wrapped.reads_videos

    @property
    def side(self) -> int:
        return self.wrapped.side

    @property
    def tile_tokens(self) -> int:
        return self.wrapped.tile_tokens

    def runs(self, size: Size) -> Runs:
        return self.wrapped.runs(size)

    def tiles(self, size: Size) -> int:
        return self.wrapped.tiles(size)

    def pixels(self, medium: Medium) -> list[np.ndarray]:
        return [np.full_like(tile, GREY) for tile in self.wrapped.pixels(medium)]


def squared(image: np.ndarray, background: tuple[int, int, int]) -> np.ndarray:
    """[height, width, 3] -> [side, side, 3] with S the longer side, in the middle of it (LLaVA's `expand2square`)."""
    height, width, _ = image.shape
    side = max(height, width)
    square = np.full((side, side, 3), background, np.uint8)
    top, left = (side - height) // 2, (side - width) // 2
    square[top : top + height, left : left + width] = image
    return square


def picture_bytes(processor: Any, picture: Any, **settings: Any) -> list[np.ndarray]:
    """Tiles [height, width, 3] uint8 by transformers' image processor, without rescaling and normalisation.

    Raises:
      ImageError: the processor refuses the picture, or gives numbers of another type.
    """
    try:
        made = processor(picture, do_rescale=False, do_normalize=False, **settings)
    except (ValueError, TypeError, LookupError, AttributeError, ZeroDivisionError, OSError) as error:
        raise ImageError(f"{type(processor).__name__} refuses the picture: {error}") from error
    values = made["pixel_values"] if hasattr(made, "keys") else made  # IDEFICS' gives the array itself
    first = values[0]
    tiles = first if isinstance(first, list) or np.ndim(first) == 4 else [first]
    if wrong := {np.asarray(tile).dtype for tile in tiles} - {np.dtype(np.uint8)}:
        raise ImageError(f"{type(processor).__name__} gives {wrong.pop()}, expected uint8")
    return [np.asarray(tile).transpose(1, 2, 0) for tile in tiles]
