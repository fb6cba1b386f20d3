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

from vlm_jax.batch import Batch
from vlm_jax.config import InSequenceConfig, LanguageConfig
from vlm_jax.config.register import MODULES
from vlm_jax.layers.stack import LanguageInputs
from vlm_jax.sharding import constrain, named

Array = jax.Array


@MODULES.add(InSequenceConfig)
class InSequence(nn.Module):
    config: InSequenceConfig
    language: LanguageConfig
    visual_width: int
    dtype: Any

    def setup(self) -> None:
        width = self.language.width
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

    def inputs(self, x: Array, batch: Batch, *, visual: Array | None, **rest: Any) -> LanguageInputs:
        """Embeddings [B, T, D] with visual tokens [B, M, R, D] in their places; nothing stands between the language layers."""
        return LanguageInputs(self._merged(x, batch.visual, visual), None, batch.prefix_end if self.config.prefix_lm else None)

    def _merged(self, x: Array, places: Array | None, visual: Array | None) -> Array:
        if places is None or visual is None:
            return x
        table = visual.reshape(visual.shape[0], -1, visual.shape[-1])
        if self.config.newline:
            newline = jnp.broadcast_to(self.newline.astype(table.dtype), (table.shape[0], 1, table.shape[-1]))
            table = jnp.concatenate([table, newline], axis=1)
        chosen = jnp.take_along_axis(table, jnp.maximum(places - 1, 0)[..., None], axis=1)
        return constrain(jnp.where(places[..., None] > 0, chosen, x).astype(x.dtype), "batch", "length", None)
