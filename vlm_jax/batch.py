"""The one batch every model of this library reads.

A row is *packed*: it holds several independent sequences ("segments") one after the other. Tokens attend only within
their segment; an image slot may be seen by several segments, so that ten questions about one picture share its encoding.

Image slots are counted from 1 within the row, 0 means "none", so that zero padding needs no special case::

    slot                   <image>  a   cat  <image>  a   dog     what  ?    (padding)
    segments                  1     1    1      1     1    1        2   2        0
    positions                 0     1    2      3     4    5        0   1        0
    media_last                1     1    1      2     2    2        0   0        0
    media_first               1     1    1      1     1    1        0   0        0

With Flamingo's "only the last image" a token sees slot `media_last`; with "all previous" the slots
`media_first..media_last`. Where visual tokens stand in the sequence, a slot is one tile of a picture (one frame), and `visual`
says which visual token stands where.

Sequences about the same images may share the tokens they begin with (`DataConfig.share_prefix`): the shared prefix is a
segment of its own, and what follows in each sequence is another one that also sees it and goes on counting its positions::

    slot                   <s>  <image>  what  ?  red   is  it  big  ?  no
    segments                1      1      2    2   2     3   3   3   3   3
    prefix_segments         0      0      1    1   1     1   1   1   1   1
    positions               0      1      2    3   4     2   3   4   5   6

The generator reads the same structure, one conversation a row, padding behind it, without targets.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax

Array = Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Batch:
    """One batch. Every field is an array (NumPy on the host, `jax.Array` sharded over the rows on the devices)."""

    images: Array | None = None  # [B, M, I, height, width, 3] uint8 RGB; absent frames are zero; None: no row has a picture
    features: Array | None = None  # [B, M, I, P, D] float32, what a frozen vision encoder makes of the images, in their place
    frames: Array | None = None  # [B, M] int32, how many frames the slot has; 0: the slot is empty; None as `images`
    tokens: Array  # [B, T] int32
    positions: Array  # [B, T] int32, counted from 0 within a segment
    segments: Array  # [B, T] int32, counted from 1 within the row; 0 is padding
    media_last: Array  # [B, T] int32, the last image slot the token may see by cross-attention
    media_first: Array  # [B, T] int32, the first slot of its segment's images
    prefix_end: Array  # [B, T] int32, the last position a prefix-LM lets the token see: the end of its own prompt, or itself
    targets: Array | None = None  # [B, T] int32, the token to predict at this place; None: nothing is learned
    weights: Array | None = None  # [B, T] float32, the weight of that prediction in the loss
    visual: Array | None = None  # [B, T] int32, the visual token that stands here, see `layers/in_sequence.py`; None: none
    prefix_segments: Array | None = None  # [B, T] int32, the segment of the shared prefix it sees too; 0: none; None: all 0
    # [B, T] int32, of the row's p-th pair of answers: p within the segment of the chosen one, -p in the rejected one; 0 is
    # padding; None: the segments are no pairs.
    preference: Array | None = None
    sizes: Array | None = None  # [B, M, I, 2] int32, height and width of frames that differ in size; None: they do not


def micro_batches(batch: Batch, count: int) -> Batch:
    """[B, ...] -> [count, B / count, ...]; every device keeps its own rows: part a has rows a, a + count, a + 2 count, ..."""
    return jax.tree.map(lambda x: x.reshape(-1, count, *x.shape[1:]).swapaxes(0, 1), batch)
