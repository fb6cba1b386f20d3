"""The vision-language model: image -> vision encoder -> connector -> fusion -> language model -> text.

Axis letters: B rows, M image slots, F frames, H x W pixels, P features, R visual tokens of a slot, T tokens, D width,
V vocabulary.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from vlm_jax.config import (
    DecoderConfig,
    GatedCrossAttentionConfig,
    InSequenceConfig,
    MlpProjectorConfig,
    ModelConfig,
    PerceiverConfig,
    VitConfig,
)
from vlm_jax.data.batch import Batch
from vlm_jax.layers.block import KeyValue
from vlm_jax.layers.decoder import Cache, Decoder
from vlm_jax.layers.gated_cross_attention import GatedCrossAttention
from vlm_jax.layers.in_sequence import InSequence
from vlm_jax.layers.perceiver import PerceiverResampler
from vlm_jax.layers.projector import MlpProjector
from vlm_jax.layers.vit import Vit

Array = jax.Array

# Which module a configuration stands for. A new part is a line here and a file in `layers/`.
VISION = {VitConfig: Vit}
CONNECTOR = {PerceiverConfig: PerceiverResampler, MlpProjectorConfig: MlpProjector}
FUSION = {GatedCrossAttentionConfig: GatedCrossAttention, InSequenceConfig: InSequence}
LANGUAGE = {DecoderConfig: Decoder}


class VisionLanguageModel(nn.Module):
    """Any vision encoder, connector, fusion and language model that fit together.

    Training calls the model on a `Batch`. Generation calls its parts: `visual_tokens` and `keys_values` once, then `embed` and
    `step` with the cache for the prompt and for every further token.
    """

    config: ModelConfig
    dtype: Any = jnp.float32
    remat: str = "none"

    def setup(self) -> None:
        config = self.config
        self.language = LANGUAGE[type(config.language)](config.language, self.dtype, self.remat)
        parts = (config.vision, config.connector, config.fusion)
        if any(parts) != all(parts):
            raise ValueError("config.model: vision, connector and fusion are all there, or none of them is")
        if self.has_vision:
            width = config.vision.block.width
            self.vision = VISION[type(config.vision)](config.vision, self.dtype, self.remat)
            self.connector = CONNECTOR[type(config.connector)](config.connector, width, self.dtype)
            self.fusion = FUSION[type(config.fusion)](config.fusion, config.language, config.visual_width, self.dtype)

    @property
    def has_vision(self) -> bool:
        """False for a language model alone."""
        return self.config.vision is not None

    @property
    def uses_cross_attention(self) -> bool:
        """Whether layers of cross-attention read the images; else their visual tokens stand in the sequence."""
        return isinstance(self.config.fusion, GatedCrossAttentionConfig)

    @property
    def is_prefix_lm(self) -> bool:
        """Whether every token of a prompt sees all of it."""
        return isinstance(self.config.fusion, InSequenceConfig) and self.config.fusion.prefix_lm

    def __call__(self, batch: Batch) -> Array:
        """Logits [B, T, V] float32 of a packed batch."""
        visual, between = self.visual_tokens(batch), None
        x = self.embed(batch.tokens, batch.positions, batch.visual, visual)
        if self.uses_cross_attention:
            media = (batch.media_first, batch.media_last)
            between = self.fusion(*media, visual.shape[1], visual=visual, segments=batch.segments)
        prefix_end = batch.prefix_end if self.is_prefix_lm else None
        hidden, _, _ = self.language(x, batch.positions, batch.segments, between=between, prefix_end=prefix_end)
        return self.language.head(hidden)

    @nn.nowrap
    def example(self) -> tuple[Batch]:
        """The least input that makes all parameters."""
        side = self.config.vision.image_size if self.has_vision else 1
        row = lambda dtype: np.zeros((1, 1), dtype)
        images = np.zeros((1, 1, 1, side, side, 3), np.uint8)
        return (Batch(images, row(np.int32), *(row(np.int32) for _ in range(6)), visual=row(np.int32)),)

    def visual_tokens(self, batch: Batch) -> Array | None:
        """Of the pictures of a batch: [B, M, R, D]; None: no visual tokens stand in the sequence.

        Where no row has a picture, the gated layers read one token that nothing sees: their feed-forward still applies to every
        token.
        """
        if not self.has_vision or (batch.images is None and not self.uses_cross_attention):
            return None
        if batch.images is None:
            return jnp.zeros((batch.tokens.shape[0], 1, 1, self.config.visual_width), self.dtype)
        return self.encode_images(batch.images, batch.frames, sizes=batch.sizes)[0]

    def encode_images(
        self, images: Array, frames: Array, want_weights: bool = False, sizes: Array | None = None
    ) -> tuple[Array, Array | None]:
        """Images [B, M, F, H, W, 3] uint8, frames [B, M] -> visual tokens [B, M, R, D].

        With `want_weights` also where each visual token looked, as the connector gives it.

        Args:
          sizes: [B, M, F, 2] int32, height and width of each frame, if they differ (`Vit`).
        """
        flat = images.reshape(-1, *images.shape[3:])
        there = None
        if sizes is not None:
            sizes = sizes.reshape(-1, 2)
            there = self.vision.patches_there(sizes, *flat.shape[1:3])
            there = there.reshape(*images.shape[:3], -1)
        features = self.vision(flat, sizes)
        features = features.reshape(*images.shape[:3], *features.shape[1:])
        return self.connector(features, frames, want_weights, there)

    def keys_values(self, visual: Array) -> KeyValue:
        """What the gated layers keep of the images: [B, M, R, D] -> two of [G, B, M * R, N, H]."""
        return self.fusion.keys_values(visual)

    def embed(self, tokens: Array, positions: Array, places: Array | None = None, visual: Array | None = None) -> Array:
        """Tokens [B, T] -> [B, T, D]; with `places` [B, T] also the visual tokens [B, M, R, D] that stand in the sequence."""
        x = self.language.embed(tokens, positions)
        if places is None or visual is None or self.uses_cross_attention:
            return x
        return self.fusion.insert(x, places, visual)

    def step(
        self,
        x: Array,
        positions: Array,
        segments: Array,
        media_first: Array,
        media_last: Array,
        cache: Cache | None,
        images: KeyValue | None,
        slots: int,
        *,
        want_weights: bool = False,
        prefix_end: Array | None = None,
    ) -> tuple[Array, Cache | None, Array | None]:
        """Some more tokens [B, T, D] of each row: hidden states [B, T, D], the cache, and where the tokens looked.

        Args:
          x: of `embed`.
          images: of `keys_values`; None: without the gated layers and their feed-forward. Rows without an image in a model
            that has such layers take the keys and values of slots that no token may see.
          slots: M.
          prefix_end: [B, T] of prompts, see `Batch`; None: these tokens are causal.
        """
        between = None
        if images is not None:
            media = (media_first, media_last)
            between = self.fusion(*media, slots, keys_values=images, segments=segments, want_weights=want_weights)
        prefix_end = prefix_end if self.is_prefix_lm else None
        return self.language(x, positions, segments, cache, between, prefix_end)

    def logits(self, hidden: Array) -> Array:
        """[B, T, D] -> [B, T, V] float32."""
        return self.language.head(hidden)
