"""Requests as the model reads them, and several of them as one batch on the mesh."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
from jax.sharding import Mesh

from vlm_jax.batch import Batch
from vlm_jax.config import ModelConfig
from vlm_jax.errors import RequestError
from vlm_jax.generation.buckets import LENGTH, SIDE_PATCHES, bucket, row_bucket
from vlm_jax.generation.request import Request
from vlm_jax.processing.batching import put_media, put_sequence
from vlm_jax.processing.layout import Layout
from vlm_jax.processing.processor import Processor
from vlm_jax.sharding import batch_sharding, batch_shards


@dataclasses.dataclass(frozen=True, slots=True)
class Prompt:
    """A request as the model reads it."""

    request: Request
    layout: Layout
    seed: int

    @property
    def length(self) -> int:
        return len(self.layout.tokens)


def place(prompts: list[Prompt], processor: Processor, config: ModelConfig, mesh: Mesh) -> Batch:
    """Prompts -> one batch on the mesh, padding behind them, its shapes rounded up to buckets."""
    rows, length = row_bucket(len(prompts), batch_shards(mesh)), bucket(max(p.length for p in prompts), LENGTH)
    names = ("tokens", "positions", "segments", "media_last", "media_first", "prefix_end")
    arrays = {name: np.zeros((rows, length), np.int32) for name in names}
    arrays["tokens"][:] = processor.pad_id
    media = processor.media
    pictures = [[media.pixels(medium) for medium in prompt.request.ordered] for prompt in prompts]
    in_sequence = media.tile_tokens > 0
    # A tile whose visual tokens stand in the sequence takes a slot; a medium that is read by cross-attention does.
    slots = bucket(max(sum(map(len, row)) if in_sequence else len(row) for row in pictures))
    if slots:
        frames = 1 if in_sequence else bucket(max(len(tiles) for row in pictures for tiles in row))
        shape = _picture_size(config, [tile.shape[:2] for row in pictures for tiles in row for tile in tiles])
        arrays["images"] = np.zeros((rows, slots, frames, *shape, 3), np.uint8)
        arrays["frames"] = np.zeros((rows, slots), np.int32)
        if config.reads_shapes:
            arrays["sizes"] = np.zeros((rows, slots, frames, 2), np.int32)
        if in_sequence:
            arrays["visual"] = np.zeros((rows, length), np.int32)
    for row, (prompt, of_prompt) in enumerate(zip(prompts, pictures, strict=True)):
        fields = {name: array[row] for name, array in arrays.items()}
        put_media(fields, of_prompt, slot=0, in_sequence=in_sequence)
        put_sequence(fields, prompt.layout, 0, slot=0, segment=1, tile_tokens=media.tile_tokens)
    return jax.device_put(Batch(**arrays), batch_sharding(mesh))


def _picture_size(config: ModelConfig, sizes: list[tuple[int, int]]) -> tuple[int, int]:
    """Height and width that all frames lie in.

    Raises:
      RequestError: they differ from what a vision encoder of one size takes.
    """
    vision = config.vision
    if config.reads_shapes:
        step = SIDE_PATCHES * vision.patch_size
        return tuple(-(-max(size[axis] for size in sizes) // step) * step for axis in (0, 1))
    expected = sizes[0] if not config.fusion.in_sequence else (vision.image_size, vision.image_size)
    wrong = {f"{height}x{width}" for height, width in sizes if (height, width) != expected}
    if wrong:
        raise RequestError(
            f"the checkpoint's picture processor gives pictures of {', '.join(sorted(wrong))} pixels where the vision "
            f"encoder takes {expected[0]}x{expected[1]}: make squares of them first"
        )
    return expected
