"""Two towers whose embeddings meet in one space: CLIP (Radford et al. 2021) and SigLIP (Zhai et al. 2023)."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

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
        features = self.encoder(images)
        if self.config.pool == "none":
            return features
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


class TextTower(nn.Module):
    """Tokens [texts, T] -> [texts, Z], not normalised.

    Padding goes behind, and no token of it is masked: CLIP's tokens see no later ones, and SigLIP is trained on 64 tokens
    with the padding among them.
    """

    config: TextTowerConfig
    dtype: Any
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
        out = decoder(inputs, positions, jnp.ones_like(positions))
        pooled = jnp.take_along_axis(out.hidden, self.place(tokens)[:, None, None], axis=1)[:, 0]
        linear = {"embed": encoder.block.width}, {"projection": config.projection}
        return Linear(*linear, config.projection_bias, self.dtype, name="projection")(pooled)

    @nn.nowrap
    def place(self, tokens: Array) -> Array:
        """Whose hidden state stands for the text: [texts]."""
        if self.config.pool == "last":
            return jnp.full(tokens.shape[:1], tokens.shape[1] - 1)
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
        width = config.image.projection or config.image.encoder.block.width
        if width != config.text.projection:
            raise ValueError(f"embeddings of images have width {width} and those of texts {config.text.projection}")
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

    def embed_images(self, images: Array) -> Array:
        """[B, height, width, 3] uint8 -> [B, Z] float32 of length 1."""
        return _unit(self.image(images))

    def embed_texts(self, tokens: Array) -> Array:
        """[texts, T] -> [texts, Z] float32 of length 1."""
        return _unit(self.text(tokens))

    def logits(self, images: Array, texts: Array) -> Array:
        """Embeddings [B, Z], [texts, Z] -> [B, texts]."""
        logits = jnp.exp(self.logit_scale) * (images @ texts.T)
        return logits if self.config.logit_bias is None else logits + self.logit_bias

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
