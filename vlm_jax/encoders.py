"""The Python API of CLIP, SigLIP and image encoders: images and texts in, vectors out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax.sharding import Mesh

from vlm_jax.interop.checkpoint import Checkpoint
from vlm_jax.processing.encoder_processor import check_list
from vlm_jax.processing.pictures import Picture
from vlm_jax.sharding import batch_sharding, batch_shards

TEMPLATE = "a photo of a {}."


class Encoder:
    """An image encoder, alone or with a text encoder beside it.

    Everywhere, `images` are files, their bytes, PIL images or arrays [height, width, 3] uint8.

    Attributes:
      checkpoint: what it was loaded from; model, params, processor: its parts; mesh: the devices.
    """

    def __init__(self, checkpoint: Checkpoint, model: nn.Module, params: Any, *, mesh: Mesh, rows: int = 16) -> None:
        """
        Args:
          rows: number of images or texts encoded at once.
        """
        self.checkpoint, self.model, self.params, self.processor = checkpoint, model, params, checkpoint.processor
        self.mesh = mesh
        shards = batch_shards(mesh)
        self.rows = -(-rows // shards) * shards
        self._apply = jax.jit(lambda method, params, *x: model.apply({"params": params}, *x, method=method), static_argnums=0)

    def features(self, images: Sequence[Picture]) -> np.ndarray:
        """The features that a language model would read: [B, P, D], with the class token first, if there is one.

        Raises:
          ImageError: a picture cannot be read.
        """
        return self._encode("features", self.processor.pixels(images))

    def embed_images(self, images: Sequence[Picture]) -> np.ndarray:
        """[B, Z] float32; of length 1 where there is a text encoder, else as the encoder pools it.

        Raises:
          ImageError: a picture cannot be read.
        """
        return self._encode("embed_images", self.processor.pixels(images))

    def embed_texts(self, texts: Sequence[str]) -> np.ndarray:
        """[texts, Z] float32 of length 1.

        Raises:
          RequestError: there is no text encoder.
        """
        return self._encode("embed_texts", self.processor.tokens(texts))

    def classify(self, images: Sequence[Picture], names: Sequence[str], template: str = TEMPLATE) -> np.ndarray:
        """Zero-shot classification by names (Radford et al. 2021, section 3.1).

        Args:
          names: of the C classes.
          template: `{}` is replaced by the class name.

        Returns:
          [B, texts] float32, the probability of every class for every image. With CLIP an image is one of the classes, and a
          row's sum is 1; with SigLIP each class is a question of its own.

        Raises:
          RequestError: there is no text encoder, or no list of names; ImageError: a picture cannot be read.
        """
        check_list("names", names)
        texts = self.embed_texts([template.replace("{}", name) for name in names])
        images = self.embed_images(images)
        with jax.set_mesh(self.mesh):
            return np.asarray(self._apply("probabilities", self.params, images, texts))

    def _encode(self, method: str, inputs: np.ndarray) -> np.ndarray:
        """Encodes `rows` inputs at a time; the last batch is padded, so that everything runs in one compiled program."""
        count = len(inputs)
        inputs = np.concatenate([inputs, np.repeat(inputs[-1:], -count % self.rows, axis=0)])
        outputs = []
        with jax.set_mesh(self.mesh):
            for part in np.split(inputs, len(inputs) // self.rows):
                placed = jax.device_put(part, batch_sharding(self.mesh))
                outputs.append(np.asarray(self._apply(method, self.params, placed), np.float32))
        return np.concatenate(outputs)[:count]
