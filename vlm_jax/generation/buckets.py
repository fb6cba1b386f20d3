"""Sizes rounded up, so that requests of similar size share one compiled program."""

from __future__ import annotations

LENGTH, SLOTS, STOPS, STOP_WIDTH = 32, 256, 16, 16  # the smallest buckets: of prompt tokens, cache slots, stop sequences

SIDE_PATCHES = 8  # pictures of any size are put into heights and widths of a multiple of so many patches


def bucket(size: int, least: int = 1) -> int:
    """The smallest power of two that is at least `size` and `least`; 0 stays 0.

    5 -> 8, and with least=32 -> 32.
    """
    return max(least, 1 << (size - 1).bit_length()) if size else 0


def row_bucket(rows: int, shards: int) -> int:
    """Rows for a mesh that splits them into `shards`: a bucket, and a multiple of `shards`."""
    return -(-bucket(rows) // shards) * shards
