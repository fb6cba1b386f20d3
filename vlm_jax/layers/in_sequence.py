"""Visual tokens in the places of `<image>` tokens (LLaVA, Liu et al. 2023; LLaVA-NeXT's newline).

Which visual token stands where is told by `visual` of the batch, counted from 1: the row's visual tokens in the order of
slots and frames, then the newline; 0 is a token of text. So tiles that are put together as a picture, cut to its shape, with a
newline after every row, are nothing but numbers::

    tokens   <s>  <image> <image> <image> <image> <image> <image>  What  ?
    visual    0      1       2       9       3       4       9      0   0      (two rows of two tokens, 8 in all, 9: newline)
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from vlm_jax.config import DecoderConfig, InSequenceConfig
from vlm_jax.config.register import MODULES
from vlm_jax.sharding import constrain, named

Array = jax.Array


@MODULES.add(InSequenceConfig)
class InSequence(nn.Module):
    config: InSequenceConfig
    language: DecoderConfig
    visual_width: int
    dtype: Any

    def setup(self) -> None:
        width = self.language.block.width
        if self.visual_width != width:
            raise ValueError(
                f"visual tokens of width {self.visual_width} cannot stand among the language model's, of width {width}: "
                "set config.model.connector.width to it"
            )
        if self.config.newline:
            self.newline = self.param("newline", named(nn.initializers.normal(width**-0.5), "norm"), (width,))

    @nn.nowrap
    def no_visual_tokens(self, rows: int) -> None:
        """Of a batch in which no row has a medium there are no visual tokens."""

    @nn.nowrap
    def media_cache(self, visual: Array | None) -> None:
        """Nothing is kept of the media beside the cache of the tokens."""

    @nn.nowrap
    def interleaved(self, media_first: Array, media_last: Array, **rest: Any) -> None:
        """Nothing stands between the language layers."""

    def merge_visual_tokens(self, x: Array, places: Array | None, visual: Array | None) -> Array:
        """Embeddings [B, T, D] with visual tokens [B, M, R, D] where `places` [B, T] int32 says."""
        if places is None or visual is None:
            return x
        table = visual.reshape(visual.shape[0], -1, visual.shape[-1])
        if self.config.newline:
            newline = jnp.broadcast_to(self.newline.astype(table.dtype), (table.shape[0], 1, table.shape[-1]))
            table = jnp.concatenate([table, newline], axis=1)
        chosen = jnp.take_along_axis(table, jnp.maximum(places - 1, 0)[..., None], axis=1)
        return constrain(jnp.where(places[..., None] > 0, chosen, x).astype(x.dtype), "batch", "length", None)
