"""CLIP's vision transformer (Radford et al. 2021; transformers' `CLIPVisionModel`).

Axis letters: B images, H x W pixels, P patches, S = 1 + P tokens, D width.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from vlm_jax.config import ClipVitConfig
from vlm_jax.layers.block import Block, rematerialised, stacked
from vlm_jax.layers.linear import Linear, Norm
from vlm_jax.ops.attention import attend
from vlm_jax.ops.patches import patchify, resize_positions
from vlm_jax.sharding import constrain, named

Array = jax.Array


class ClipVit(nn.Module):
    """Images [B, H, W, 3] uint8 -> features [B, P, D], or [B, 1 + P, D] with the class token in front.

    Pictures of another size than `image_size` get interpolated positions. `feature_layer` picks the hidden state as
    transformers counts them: 0 the embeddings, i the output of block i, negative from the end.
    """

    config: ClipVitConfig
    dtype: Any
    remat: str = "none"

    @nn.compact
    def __call__(self, images: Array) -> Array:
        hidden = self.hidden_states(images, last=self.used_layers())
        if self.config.post_norm or self.config.holds_post_norm:
            normed = Norm(self.config.block.norm, self.config.block.width, self.dtype, name="post_norm")(hidden)
            hidden = normed if self.config.post_norm else hidden
        return hidden if self.config.class_token else hidden[:, 1:]

    def used_layers(self) -> int:
        """How many blocks run for `feature_layer`.

        Raises:
          ValueError: there is no such layer.
        """
        layers, index = self.config.layers, self.config.feature_layer
        used = layers + 1 + index if index < 0 else index
        if not 0 <= used <= layers:
            raise ValueError(f"feature_layer {index}: a ViT of {layers} layers has hidden states {-layers - 1}..{layers}")
        return used

    @nn.nowrap
    def normalise(self, images: Array) -> Array:
        """uint8 RGB -> float32 with the encoder's mean and deviation."""
        mean, std = (jnp.asarray(value, jnp.float32) for value in (self.config.mean, self.config.std))
        return (images.astype(jnp.float32) / 255.0 - mean) / std

    @nn.nowrap
    def hidden_states(self, images: Array, last: int) -> Array:
        """[B, 1 + P, D] after `last` blocks; must run inside `__call__`."""
        config, width = self.config, self.config.block.width
        patch, side = config.patch_size, config.image_size // config.patch_size
        x = patchify(self.normalise(images), patch)
        x = Linear({"pixels": 3 * patch * patch}, {"embed": width}, False, self.dtype, name="patch_embedding")(x)
        small = nn.initializers.normal(width**-0.5)
        token = self.param("class_embedding", named(small, "embed"), (width,))
        places = nn.initializers.normal(config.position_init or width**-0.5)
        positions = self.param("position_embedding", named(places, "positions", "embed"), (1 + side * side, width))
        grid = (images.shape[1] // patch, images.shape[2] // patch)
        positions = jnp.concatenate([positions[:1], resize_positions(positions[1:], grid)])
        x = jnp.concatenate([jnp.broadcast_to(token.astype(x.dtype), (x.shape[0], 1, width)), x], axis=1)
        x = Norm(config.block.norm, width, self.dtype, name="pre_norm")(x + positions.astype(x.dtype))

        block = Block(config.block, self.dtype, parent=None)
        see_all = lambda q, k, v: (attend(q, k, v), None)
        params = stacked(self, "layers", block, config.layers, jnp.zeros((1, 1, width)), see_all)

        def layer(x: Array, params: Any) -> tuple[Array, None]:
            return constrain(block.apply({"params": params}, x, see_all)[0], "batch", "length", None), None

        used = jax.tree.map(lambda p: p[:last], params)
        return jax.lax.scan(rematerialised(layer, self.remat), x, used)[0]
