"""Two towers whose embeddings meet in one space: CLIP (Radford et al. 2021) and SigLIP (Zhai et al. 2023).

Any image encoder and any text encoder may be the towers: DINOv2 and a BERT that writes sentence embeddings, for example.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from vlm_jax.batch import Batch
from vlm_jax.config import DualEncoderConfig, ImageTowerConfig, TextTowerConfig
from vlm_jax.config.register import MODULES
from vlm_jax.errors import RequestError
from vlm_jax.layers.attention_pool import AttentionPool
from vlm_jax.layers.decoder import Decoder
from vlm_jax.layers.linear import Linear
from vlm_jax.layers.stack import LanguageInputs
from vlm_jax.layers.vit import Vit
from vlm_jax.sharding import named

Array = jax.Array


@MODULES.add(ImageTowerConfig)
class ImageTower(nn.Module):
    """A vision encoder and what makes one vector of its features, if anything does."""

    config: ImageTowerConfig
    dtype: Any = jnp.float32
    remat: str = "none"

    def setup(self) -> None:
        config, block = self.config, self.config.encoder.block
        if config.pool == "class_token" and config.encoder.class_token != "kept":
            raise ValueError("image.pool is the class token: set image.encoder.class_token='kept'")
        self.encoder = Vit(config.encoder, self.dtype, self.remat)
        if config.pool == "attention":
            self.pool = AttentionPool(block, self.dtype)
        if config.projection is not None:
            self.projection = Linear({"embed": block.width}, {"projection": config.projection}, False, self.dtype)

    def __call__(self, images: Array) -> Array:
        """[B, height, width, 3] uint8 -> [B, Z], not normalised; without a pool the features."""
        return self.features(images) if self.config.pool == "none" else self.from_cached(self.cached_features(images))

    def cached_features(self, images: Array) -> Array:
        """What `data.cache_features` keeps: [B, 1, D], the pooled vector; [B, P, D], where the pool has parameters."""
        features, pool = self.encoder(images), self.config.pool
        if pool == "attention":
            return features
        if pool == "mean":
            return jnp.mean(features[:, self.config.encoder.front_features :], axis=1, keepdims=True)
        return features[:, :1]

    def from_cached(self, features: Array) -> Array:
        """`cached_features` -> [B, Z], not normalised."""
        pooled = self.pool(features) if self.config.pool == "attention" else features[:, 0]
        return pooled if self.config.projection is None else self.projection(pooled)

    def features(self, images: Array) -> Array:
        """[B, height, width, 3] uint8 -> [B, P, D], the class token first where there is one."""
        return self.encoder(images)

    def embed_images(self, images: Array) -> Array:
        """[B, height, width, 3] uint8 -> [B, Z] float32, not normalised.

        Raises:
          RequestError: nothing makes one vector of the features.
        """
        if self.config.pool == "none":
            raise RequestError("this encoder has no pooling head that makes one vector of an image: use features(images)")
        return self(images).astype(jnp.float32)

    @nn.nowrap
    def example(self) -> tuple[np.ndarray]:
        """The least input that makes all parameters."""
        return Vit(self.config.encoder, self.dtype).example()


@MODULES.add(TextTowerConfig)
class TextTower(nn.Module):
    """Tokens [texts, T] -> [texts, Z], not normalised.

    Padding goes behind. CLIP's tokens see no later ones, and SigLIP is trained on 64 tokens with the padding among them, so
    none of it is masked there; a BERT's `pad_token` is.
    """

    config: TextTowerConfig
    dtype: Any = jnp.float32
    remat: str = "none"

    @nn.compact
    def __call__(self, tokens: Array) -> Array:
        config, encoder = self.config, self.config.encoder
        length = tokens.shape[1]
        if length > encoder.max_positions:
            raise ValueError(f"{length} tokens of text: the tower has learned {encoder.max_positions} positions; truncate it")
        positions = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), tokens.shape)
        decoder = Decoder(encoder, self.dtype, self.remat, name="encoder")
        last_seen = None if config.causal else jnp.full(tokens.shape, length - 1, jnp.int32)
        inputs = LanguageInputs(decoder.embed(tokens), prefix_end=last_seen)
        segments = jnp.ones_like(positions) if config.pad_token is None else (tokens != config.pad_token).astype(jnp.int32)
        hidden = decoder(inputs, positions, segments).hidden
        if config.pool == "mean":
            shares = segments / jnp.maximum(jnp.sum(segments, axis=1, keepdims=True), 1)
            pooled = jnp.einsum("BTD,BT->BD", hidden, shares.astype(hidden.dtype))
        else:
            pooled = jnp.take_along_axis(hidden, self.place(tokens)[:, None, None], axis=1)[:, 0]
        if config.projection is None:
            return pooled
        linear = {"embed": encoder.block.width}, {"projection": config.projection}
        return Linear(*linear, config.projection_bias, self.dtype, name="projection")(pooled)

    def embed_texts(self, tokens: Array) -> Array:
        """[texts, T] -> [texts, Z] float32 of length 1."""
        return _unit(self(tokens))

    @nn.nowrap
    def example(self) -> tuple[np.ndarray]:
        """The least input that makes all parameters."""
        return (np.zeros((1, 1), np.int32),)

    @nn.nowrap
    def place(self, tokens: Array) -> Array:
        """Whose hidden state stands for the text: [texts]."""
        if self.config.pool in ("first", "last"):
            return jnp.full(tokens.shape[:1], 0 if self.config.pool == "first" else tokens.shape[1] - 1)
        end = self.config.end_token
        return jnp.argmax(tokens if end is None else tokens == end, axis=1)


@MODULES.add(DualEncoderConfig)
class DualEncoder(nn.Module):
    """How well each image fits each text."""

    config: DualEncoderConfig
    dtype: Any = jnp.float32
    remat: str = "none"

    def setup(self) -> None:
        config = self.config
        if config.image.pool == "none":
            raise ValueError("image.pool='none': two towers need a vector of an image: expected class_token, mean or attention")
        if config.image.width != config.text.width:
            raise ValueError(f"embeddings of images have width {config.image.width} and those of texts {config.text.width}")
        self.image = ImageTower(config.image, self.dtype, self.remat)
        self.text = TextTower(config.text, self.dtype, self.remat)
        scalar = lambda name, start: self.param(name, named(nn.initializers.constant(start)), ())
        self.logit_scale = scalar("logit_scale", config.logit_scale)
        if config.logit_bias is not None:
            self.logit_bias = scalar("logit_bias", config.logit_bias)

    def __call__(self, images: Array, tokens: Array) -> Array:
        """Images [B, height, width, 3] uint8, tokens [texts, T] -> logits [B, texts] float32."""
        return self.logits(self.embed_images(images), self.embed_texts(tokens))

    def features(self, images: Array) -> Array:
        """[B, height, width, 3] uint8 -> [B, P, D], the class token first where there is one."""
        return self.image.features(images)

    def cached_features(self, images: Array) -> Array:
        """See `ImageTower.cached_features`."""
        return self.image.cached_features(images)

    def embed_cached(self, features: Array) -> Array:
        """`cached_features` -> [B, Z] float32 of length 1."""
        return _unit(self.image.from_cached(features.astype(self.dtype)))

    def embed_pairs(self, batch: Batch) -> tuple[Array, Array]:
        """Of a batch with a pair a row, the embeddings of its images and of its texts: each [B, Z] float32 of length 1."""
        cached = batch.features is not None
        images = self.embed_cached(batch.features[:, 0, 0]) if cached else self.embed_images(batch.images[:, 0, 0])
        return images, self.embed_texts(batch.tokens)

    def logit_scalars(self) -> tuple[Array, Array]:
        """What logits are made with, beside the embeddings: the scale, and the bias, 0 where there is none; [] float32."""
        bias = jnp.zeros(()) if self.config.logit_bias is None else self.logit_bias
        return jnp.exp(self.logit_scale), bias

    def embed_images(self, images: Array) -> Array:
        """[B, height, width, 3] uint8 -> [B, Z] float32 of length 1."""
        return _unit(self.image(images))

    def embed_texts(self, tokens: Array) -> Array:
        """[texts, T] -> [texts, Z] float32 of length 1."""
        return _unit(self.text(tokens))

    def logits(self, images: Array, texts: Array) -> Array:
        """Embeddings [B, Z], [texts, Z] -> [B, texts]."""
        scale, bias = self.logit_scalars()
        return scale * (images @ texts.T) + bias

    def probabilities(self, images: Array, texts: Array) -> Array:
        """Embeddings [B, Z], [texts, Z] -> [B, texts].

        Which of the texts it is, rows of sum 1 (softmax); or of each text by itself whether it fits (sigmoid).
        """
        logits = self.logits(images, texts)
        return jax.nn.softmax(logits) if self.config.loss == "softmax" else jax.nn.sigmoid(logits)

    @nn.nowrap
    def example(self) -> tuple[np.ndarray, np.ndarray]:
        """The least inputs that make all parameters."""
        return (*ImageTower(self.config.image).example(), np.zeros((1, 1), np.int32))


def _unit(x: Array) -> Array:
    """Float32 and of length 1 along the last axis."""
    x = x.astype(jnp.float32)
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)
