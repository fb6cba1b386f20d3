"""The vision-language model: image -> vision encoder -> connector -> fusion -> language model -> text.

Axis letters: B rows, M image slots, F frames, H x W pixels, P features, R visual tokens of a slot, T tokens, D width,
V vocabulary.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from vlm_jax.config import ClipVitConfig, DecoderConfig, GatedCrossAttentionConfig, ModelConfig, PerceiverConfig
from vlm_jax.data.batch import Batch
from vlm_jax.layers.block import KeyValue
from vlm_jax.layers.decoder import Cache, Decoder
from vlm_jax.layers.gated_cross_attention import GatedCrossAttention
from vlm_jax.layers.perceiver import PerceiverResampler
from vlm_jax.layers.vit import ClipVit

Array = jax.Array

# Which module a configuration stands for. A new part is a line here and a file in `layers/`.
VISION = {ClipVitConfig: ClipVit}
CONNECTOR = {PerceiverConfig: PerceiverResampler}
FUSION = {GatedCrossAttentionConfig: GatedCrossAttention}
LANGUAGE = {DecoderConfig: Decoder}


class VisionLanguageModel(nn.Module):
    """Any vision encoder, connector, fusion and language model that fit together.

    Training calls the model on a `Batch`. Generation calls its parts: `encode_images` once, `keys_values` once, then `step`
    with the cache for the prompt and for every further token.
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
        if self.sees:
            width = config.vision.block.width
            self.vision = VISION[type(config.vision)](config.vision, self.dtype, self.remat)
            self.connector = CONNECTOR[type(config.connector)](config.connector, width, self.dtype)
            self.fusion = FUSION[type(config.fusion)](config.fusion, config.language, width, self.dtype)

    @property
    def sees(self) -> bool:
        """False for a language model alone."""
        return self.config.vision is not None

    def __call__(self, batch: Batch) -> Array:
        """Logits [B, T, V] float32 of a packed batch."""
        x = self.language.embed(batch.tokens, batch.positions)
        between = None
        if self.sees:
            visual, _ = self.encode_images(batch.images, batch.frames)
            between = self.fusion(batch.media_first, batch.media_last, batch.frames.shape[1], visual=visual)
        hidden, _, _ = self.language(x, batch.positions, batch.segments, between=between)
        return self.language.head(hidden)

    def encode_images(self, images: Array, frames: Array, want_weights: bool = False) -> tuple[Array, Array | None]:
        """Images [B, M, F, H, W, 3] uint8, frames [B, M] -> visual tokens [B, M, R, D].

        With `want_weights` also where each visual token looked, as the connector gives it.
        """
        features = self.vision(images.reshape(-1, *images.shape[3:]))
        features = features.reshape(*images.shape[:3], *features.shape[1:])
        return self.connector(features, frames, want_weights)

    def keys_values(self, visual: Array) -> KeyValue:
        """What generation keeps of the images: [B, M, R, D] -> two of [G, B, M * R, N, H]."""
        return self.fusion.keys_values(visual)

    def step(
        self,
        tokens: Array,
        positions: Array,
        segments: Array,
        media_first: Array,
        media_last: Array,
        cache: Cache | None,
        images: KeyValue | None,
        slots: int,
        want_weights: bool = False,
    ) -> tuple[Array, Cache | None, Array | None]:
        """Some more tokens [B, T] of each row: hidden states [B, T, D], the cache, and where the tokens looked.

        Args:
          images: of `keys_values`; None: the language model alone, without the gated layers and their feed-forward. Rows
            without an image in a model that sees take the keys and values of slots that no token may see.
          slots: M.
        """
        x = self.language.embed(tokens, positions)
        between = None
        if images is not None:
            between = self.fusion(media_first, media_last, slots, keys_values=images, want_weights=want_weights)
        return self.language(x, positions, segments, cache, between)

    def logits(self, hidden: Array) -> Array:
        """[B, T, D] -> [B, T, V] float32."""
        return self.language.head(hidden)
