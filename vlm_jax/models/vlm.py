"""The vision-language model: image -> vision encoder -> connector -> fusion -> language model -> text."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from vlm_jax.batch import Batch
from vlm_jax.config import ModelConfig
from vlm_jax.config.register import MODULES, module_of
from vlm_jax.layers.decoder import Cache, Output
from vlm_jax.layers.stack import LanguageInputs

Array = jax.Array


@MODULES.add(ModelConfig)
class VisionLanguageModel(nn.Module):
    """Any vision encoder, connector, fusion and language model that fit together.

    Training calls the model on a `Batch`. Generation calls its parts: `visual_tokens` and `media_cache` once, then `forward`
    with a cache for the prompt and for every further token, both of which are batches too.
    """

    config: ModelConfig
    dtype: Any = jnp.float32
    remat: str = "none"

    def setup(self) -> None:
        config = self.config
        self.language = module_of(config.language)(config.language, self.dtype, self.remat)
        parts = (config.vision, config.connector, config.fusion)
        if any(parts) != all(parts):
            raise ValueError("config.model: vision, connector and fusion are all there, or none of them is")
        if self.has_vision:
            width = config.vision.width
            self.vision = module_of(config.vision)(config.vision, self.dtype, self.remat)
            self.connector = module_of(config.connector)(config.connector, width, self.dtype)
            self.fusion = module_of(config.fusion)(config.fusion, config.language, config.visual_width, self.dtype)

    @property
    def has_vision(self) -> bool:
        """False for a language model alone."""
        return self.config.has_vision

    @property
    def uses_cross_attention(self) -> bool:
        """Whether layers of cross-attention read the images; else their visual tokens stand in the sequence."""
        return self.has_vision and not self.config.fusion.in_sequence

    def __call__(self, batch: Batch) -> Array:
        """Logits [B, T, V] float32 of a packed batch."""
        return self.logits(self.hidden(batch)[0])

    def hidden(self, batch: Batch) -> tuple[Array, dict[str, Array]]:
        """Of a packed batch, the hidden states [B, T, D], and what each layer gives beside them, [L, ...] (`Block`)."""
        out = self.forward(batch, visual=self.visual_tokens(batch))
        return out.hidden, out.layers

    @nn.nowrap
    def example(self) -> tuple[Batch]:
        """The least input that makes all parameters."""
        side = self.config.vision.image_size if self.has_vision else 1
        images = np.zeros((1, 1, 1, side, side, 3), np.uint8)
        names = ("frames", "tokens", "positions", "segments", "media_last", "media_first", "prefix_end", "visual")
        return (Batch(images=images, **{name: np.zeros((1, 1), np.int32) for name in names}),)

    def visual_tokens(self, batch: Batch) -> Array | None:
        """Of the pictures of a batch: [B, M, R, D]; None: the fusion needs none."""
        if not self.has_vision:
            return None
        if batch.features is not None:
            return self.connector(batch.features.astype(self.dtype), batch.frames, mask=None, return_attention=False)[0]
        if batch.images is None:
            return self.fusion.no_visual_tokens(batch.tokens.shape[0])
        return self.encode_images(batch.images, batch.frames, sizes=batch.sizes)[0]

    def features(self, images: Array) -> Array:
        """[B, height, width, 3] uint8 -> what the connector reads, [B, P, D]."""
        return self.vision(images)

    def cached_features(self, images: Array) -> Array:
        """What `data.cache_features` keeps in the place of pixels."""
        return self.features(images)

    def encode_images(
        self, images: Array, frames: Array, *, sizes: Array | None = None, return_attention: bool = False
    ) -> tuple[Array, Array | None]:
        """Images [B, M, I, height, width, 3] uint8, frames [B, M] -> visual tokens [B, M, R, D].

        With `return_attention` also where each visual token looked, as the connector gives it.

        Args:
          sizes: [B, M, I, 2] int32, height and width of each frame, if they differ (`Vit`).
        """
        flat = images.reshape(-1, *images.shape[3:])
        mask = None
        if sizes is not None:
            sizes = sizes.reshape(-1, 2)
            mask = self.vision.patch_mask(sizes, *flat.shape[1:3]).reshape(*images.shape[:3], -1)
        features = self.vision(flat, sizes)
        features = features.reshape(*images.shape[:3], *features.shape[1:])
        return self.connector(features, frames, mask=mask, return_attention=return_attention)

    def media_cache(self, visual: Array | None) -> Any:
        """What is kept of the visual tokens [B, M, R, D] while the model answers; None: nothing.

        A pytree with the rows first in every array, or one that has `map_rows` and `placed` as `Cache` does."""
        return self.fusion.media_cache(visual) if self.has_vision else None

    def forward(
        self,
        batch: Batch,
        *,
        visual: Array | None = None,
        media_cache: Any = None,
        cache: Cache | None = None,
        return_cache: bool = False,
        return_attention: bool = False,
    ) -> Output:
        """The tokens of a batch [B, T]: hidden states [B, T, D], and what else `Output` has.

        Args:
          visual: of `visual_tokens`, where the batch begins its rows; or
          media_cache: of `media_cache`, where it goes on with them.
          cache: of the tokens before these.
          return_cache: whether tokens that begin their rows leave a cache.
          return_attention: also where every token looked, as the fusion tells it.
        """
        inputs = LanguageInputs(self.language.embed(batch.tokens))
        if self.has_vision:
            media = dict(visual=visual, media_cache=media_cache, return_attention=return_attention)
            inputs = self.fusion.inputs(inputs.embeddings, batch, **media)
        inputs = inputs._replace(prefix_segments=batch.prefix_segments)
        return self.language(inputs, batch.positions, batch.segments, cache=cache, return_cache=return_cache)

    def logits(self, hidden: Array) -> Array:
        """[B, T, D] -> [B, T, V] float32."""
        return self.language.head(hidden)
