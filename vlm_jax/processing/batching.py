"""A conversation into a row of a batch: tiles into slots, tokens into places. Training and generation call the same."""

from __future__ import annotations

import numpy as np

from vlm_jax.processing.layout import NEWLINE, Layout, prefix_ends

Arrays = dict[str, np.ndarray]  # the fields of `Batch`
Tiles = list[np.ndarray]  # [height, width, 3] uint8 each, or their features [P, D] float32


def put_media(row: Arrays, media: list[Tiles], *, slot: int, in_sequence: bool) -> int:
    """Writes tiles into a row from `slot` on, and returns how many slots they take.

    Args:
      row: the fields of Batch without their B axis.
      in_sequence: a tile takes a slot; else a medium does, with its frames.

    Raises:
      ValueError: a tile of another size than the row's square, or a larger one where sizes may differ.
    """
    groups = [[tile] for tiles in media for tile in tiles] if in_sequence else media
    for number, group in enumerate(groups, slot):
        row["frames"][number] = len(group)
        for frame, tile in enumerate(group):
            if "features" in row:
                row["features"][number, frame] = tile
                continue
            height, width = tile.shape[:2]
            room = row["images"].shape[2:4]
            fits = height <= room[0] and width <= room[1] if "sizes" in row else (height, width) == room
            if not fits:
                raise ValueError(f"a tile of {height}x{width} pixels, and a slot has {room[0]}x{room[1]}")
            row["images"][number, frame, :height, :width] = tile
            if "sizes" in row:
                row["sizes"][number, frame] = height, width
    return len(groups)


def put_sequence(row: Arrays, layout: Layout, begin: int, *, slot: int, segment: int, tile_tokens: int, after: int = 0) -> int:
    """Writes a sequence into a row from place `begin` on, and returns where it ends.

    Args:
      layout: a prompt, or a conversation without its last token.
      slot: how many slots of the row come before those of the sequence.
      segment: its number, from 1.
      tile_tokens: R; 0 under cross-attention.
      after: how many tokens of the sequence stand before these, in the segment of its prefix.
    """
    length = len(layout.tokens)
    here = slice(begin, begin + length)
    positions = np.arange(after, after + length, dtype=np.int32)
    row["tokens"][here], row["positions"][here], row["segments"][here] = layout.tokens, positions, segment
    row["media_last"][here] = np.where(layout.media_last > 0, layout.media_last + slot, 0)
    row["media_first"][here] = np.where(layout.media_first > 0, layout.media_first + slot, 0)
    row["prefix_end"][here] = prefix_ends(layout.flags, positions)
    if "visual" in row:
        newline = len(row["frames"]) * tile_tokens + 1
        moved = np.where(layout.visual > 0, layout.visual + slot * tile_tokens, 0)
        row["visual"][here] = np.where(layout.visual == NEWLINE, newline, moved)
    return begin + length
