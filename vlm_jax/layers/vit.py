"""The vision transformer (Dosovitskiy et al. 2021): CLIP's (Radford et al. 2021), SigLIP's (Zhai et al. 2023), DINOv2's (Oquab
et al. 2023) and EVA-CLIP's (Sun et al. 2023), as transformers has them.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from vlm_jax.config import VitConfig
from vlm_jax.config.register import MODULES
from vlm_jax.layers.attention_pool import AttentionPool
from vlm_jax.layers.block import Block
from vlm_jax.layers.linear import Linear, Norm
from vlm_jax.layers.stack import rematerialised, stacked
from vlm_jax.ops.attention import attend
from vlm_jax.ops.masks import Mask
from vlm_jax.ops.patches import bucketed_positions, normalised, patch_mask, patchify, resize_positions
from vlm_jax.sharding import constrain, named

Array = jax.Array


@MODULES.add(VitConfig)
class Vit(nn.Module):
    """Images [B, height, width, 3] uint8 -> features [B, P, O], or [B, 1 + P, O] with the class token in front.

    Registers are left out, but with `keep_registers`. Pictures of another size than the positions were learned for get
    interpolated or bucketed positions. `feature_layer` picks the hidden state as transformers counts them: 0 the embeddings, i
    the output of block i, negative from the end. O is D, or with several such layers that many times D.
    """

    config: VitConfig
    dtype: Any
    remat: str = "none"

    @nn.compact
    def __call__(self, images: Array, sizes: Array | None = None) -> Array:
        """
        Args:
          sizes: [B, 2] int32, height and width of the pictures, which lie in the upper left of `images`: nothing else is seen.
            None: they are `images`.

        Raises:
          ValueError: `sizes` where positions are not bucketed.
        """
        config = self.config
        if sizes is not None and config.positions != "bucketed":
            raise ValueError("pictures of several sizes at once need bucketed positions")
        chosen = self.hidden_states(images, self.used_layers(), sizes)
        if config.post_norm != "none":
            norm = Norm(config.block.norm, config.block.width, self.dtype, name="post_norm")
            normed = [norm(hidden) for hidden in chosen]
            chosen = normed if config.post_norm == "applied" else chosen
        if config.pooling_head:
            AttentionPool(config.block, self.dtype, name="pooling_head")(chosen[-1])
        hidden = jnp.concatenate(chosen, axis=-1)
        left_out = int(config.class_token != "none") + (0 if config.keep_registers else config.registers)
        behind = hidden[:, left_out:]
        return jnp.concatenate([hidden[:, :1], behind], axis=1) if config.class_token == "kept" else behind

    @nn.nowrap
    def example(self) -> tuple[np.ndarray]:
        """The least input that makes all parameters."""
        return (np.zeros((1, self.config.image_size, self.config.image_size, 3), np.uint8),)

    def used_layers(self) -> tuple[int, ...]:
        """How many blocks run for each of `feature_layers`.

        Raises:
          ValueError: there is no such layer, or none is named.
        """
        layers, chosen = self.config.layers, self.config.feature_layers
        wrong = [index for index in chosen if not -layers - 1 <= index <= layers]
        if wrong or not chosen:
            found = wrong[0] if wrong else chosen
            raise ValueError(f"feature_layer {found}: a ViT of {layers} layers has hidden states {-layers - 1}..{layers}")
        return tuple(layers + 1 + index if index < 0 else index for index in chosen)

    @nn.nowrap
    def patch_mask(self, sizes: Array, height: int, width: int) -> Array:
        """Of pictures of `sizes` pixels [B, 2] in the upper left of `height` x `width`, the whole patches: [B, P] bool."""
        patch = self.config.patch_size
        return patch_mask(sizes // patch, (height // patch, width // patch))

    @nn.nowrap
    def normalise(self, images: Array) -> Array:
        """uint8 RGB -> float32 with the encoder's mean and deviation."""
        return normalised(images, self.config.mean, self.config.std)

    @nn.nowrap
    def hidden_states(self, images: Array, after: tuple[int, ...], sizes: Array | None = None) -> list[Array]:
        """[B, S, D] after each number of blocks; must run inside `__call__`."""
        config, width = self.config, self.config.block.width
        patch, side = config.patch_size, (config.learned_size or config.image_size) // config.patch_size
        grid = (images.shape[1] // patch, images.shape[2] // patch)
        if config.image_size % patch or config.positions == "bucketed":
            # SigLIP-so400m's 384 pixels are 27 patches of 14: the published convolution leaves the last 6 out.
            images = images[:, : images.shape[1] // patch * patch, : images.shape[2] // patch * patch]
        x = patchify(self.normalise(images), patch)
        inputs, outputs = {"pixels": 3 * patch * patch}, {"embed": width}
        x = Linear(inputs, outputs, config.patch_bias, self.dtype, name="patch_embedding")(x)
        small = nn.initializers.normal(width**-0.5)
        spread = nn.initializers.normal(config.position_init or width**-0.5)
        front = int(config.class_token != "none")
        positions = self.param("position_embedding", named(spread, "positions", "embed"), (front + side * side, width))
        mask = None
        if config.positions == "bucketed":
            whole = jnp.broadcast_to(jnp.asarray(images.shape[1:3]), (images.shape[0], 2))
            places = bucketed_positions((whole if sizes is None else sizes) // patch, grid, side)
            x = x + jnp.take(positions[front:], places, axis=0).astype(x.dtype)
            if sizes is not None:
                whole = patch_mask(sizes // patch, grid)
                mask = Mask.from_keys(jnp.pad(whole, ((0, 0), (front + config.registers, 0)), constant_values=True))
        else:
            x = x + resize_positions(positions[front:], grid, config.antialias).astype(x.dtype)
        before = [self.param("class_embedding", named(small, "embed"), (width,))[None] + positions[:1]] if front else []
        if config.registers:
            before.append(self.param("registers", named(small, "latents", "embed"), (config.registers, width)))
        if before:
            tokens = jnp.concatenate(before).astype(x.dtype)
            x = jnp.concatenate([jnp.broadcast_to(tokens, (x.shape[0], *tokens.shape)), x], axis=1)
        if config.mask_token:
            self.param("mask_token", named(nn.initializers.zeros, "embed"), (width,))
        if config.pre_norm:
            x = Norm(config.block.norm, width, self.dtype, name="pre_norm")(x)

        block = Block(config.block, self.dtype, parent=None)
        see_all = lambda q, k, v: (attend(q, k, v, mask), None)
        params = stacked(self, "layers", block, config.layers, jnp.zeros((1, 1, width)), lambda q, k, v: (q, None))

        def layer(x: Array, params: Any) -> tuple[Array, None]:
            return constrain(block.apply({"params": params}, x, see_all)[0], "batch", "length", None), None

        states, done = {}, 0
        for number in sorted(set(after)):
            some = jax.tree.map(lambda p, start=done, stop=number: p[start:stop], params)
            x, done = jax.lax.scan(rematerialised(layer, self.remat), x, some)[0], number
            states[number] = x
        return [states[number] for number in after]
