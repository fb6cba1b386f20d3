"""Flamingo's gated cross-attention dense layers (Alayrac et al. 2022, section 3.2 and figure 4)."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from vlm_jax.batch import Batch
from vlm_jax.config import GatedCrossAttentionConfig, LanguageConfig
from vlm_jax.config.register import MODULES
from vlm_jax.layers.block import Attention, KeyValue, Mlp
from vlm_jax.layers.linear import Norm
from vlm_jax.layers.stack import InterleavedLayers, LanguageInputs, stacked
from vlm_jax.ops.masks import Mask, media_mask
from vlm_jax.sharding import constrain, named

Array = jax.Array


@functools.partial(jax.tree_util.register_dataclass, data_fields=["keys_values"], meta_fields=["slots"])
@dataclasses.dataclass(frozen=True)
class MediaCache:
    """What the gated layers keep of the media of every row."""

    keys_values: Any  # two of [L, B, M * R, N, H], or where layers are held one by one a tuple of L such pairs without L
    slots: int  # M

    def map_rows(self, fn: Callable[..., Array], *others: MediaCache) -> MediaCache:
        """`fn(array, *arrays of the others, axis=that of the rows)` of every array."""
        single = isinstance(self.keys_values[0], tuple)  # layers one by one
        fn = functools.partial(fn, axis=0 if single else 1)
        return dataclasses.replace(self, keys_values=jax.tree.map(fn, *(cache.keys_values for cache in (self, *others))))

    def placed(self) -> MediaCache:
        """Where it lies on the mesh of the context: as it was made."""
        return self


class GatedCrossAttentionBlock(nn.Module):
    """x + tanh(gate) attention(x over the images), then, with a feed-forward, x + tanh(gate) mlp(x).

    Both gates start at 0, so that the frozen language model is untouched at first; with `gating="none"` there are none. A
    token that sees no image gets nothing from the attention; the feed-forward applies to every token.
    """

    config: GatedCrossAttentionConfig
    width: int
    visual_width: int
    dtype: Any

    def setup(self) -> None:
        config = self.config
        self.attention_norm = Norm(config.norm, self.width, self.dtype)
        self.attention = Attention(
            self.width,
            self.visual_width,
            config.heads,
            config.heads,
            config.head_width,
            self.dtype,
            qk_norm=config.norm if config.qk_norm else None,
        )
        if config.mlp_width:
            self.mlp_norm = Norm(config.norm, self.width, self.dtype)
            self.mlp = Mlp(self.width, config.mlp_width, config.activation, config.gated_mlp, False, self.dtype)
        closed = named(nn.initializers.zeros)
        halves = ("attention", "mlp") if config.mlp_width else ("attention",)
        self.gates = [self.param(f"{half}_gate", closed, ()) for half in halves] if config.gating == "tanh" else []

    def keys_values(self, visual: Array) -> KeyValue:
        """Visual tokens [B, S, O] -> keys and values, each [B, S, N, H]."""
        return self.attention.keys_values(visual)

    def weights(self, x: Array, mask: Mask, visual: Array | None, kv: KeyValue | None = None) -> Array:
        """Where each token looks: [B, T, S]."""
        return self.attention.weights(self.attention_norm(x), kv or self.keys_values(visual), mask)

    def __call__(
        self, x: Array, mask: Mask, visual: Array | None, kv: KeyValue | None = None, uniform: Array | None = None
    ) -> Array:
        """x [B, T, D], mask of T tokens and S keys, and visual tokens [B, S, O] or the keys and values made of them.

        Tokens in `uniform` [B, T] look at all that they see with the same weight.
        """
        kv = kv or self.keys_values(visual)
        gates = [jnp.tanh(gate).astype(self.dtype) for gate in self.gates] or [1.0, 1.0]
        y = self.attention_norm(x)
        # A query of zeros is as near to one key as to another.
        y = y if uniform is None else jnp.where(uniform[..., None], 0, y)
        x = x + gates[0] * self.attention(y, kv, mask)
        return x + gates[1] * self.mlp(self.mlp_norm(x)) if self.config.mlp_width else x


@MODULES.add(GatedCrossAttentionConfig)
class GatedCrossAttention(nn.Module):
    """All gated layers of a model, standing where `GatedCrossAttentionConfig` says."""

    config: GatedCrossAttentionConfig
    language: LanguageConfig
    visual_width: int
    dtype: Any

    def setup(self) -> None:
        config, width = self.config, self.language.width
        count = len(range(config.start + config.offset, self.language.layers, config.every))
        if not 0 <= config.offset < config.every or config.start < 0 or not count:
            raise ValueError(
                f"gated layers at every {config.every}th layer from {config.start} + {config.offset}: the offset must be below "
                f"`every`, and at least one of the {self.language.layers} layers must match"
            )
        self.block = GatedCrossAttentionBlock(config, width, self.visual_width, self.dtype, parent=None)
        example = (jnp.zeros((1, 1, width)), Mask.from_keys(jnp.ones((1, 1), bool)), jnp.zeros((1, 1, self.visual_width)))
        self.layers = stacked(self, "layers", self.block, count, *example)

    @nn.nowrap
    def no_visual_tokens(self, rows: int) -> Array:
        """Visual tokens [B, 1, 1, O] of a batch in which no row has a medium: one, that nothing sees.

        The gated feed-forward still applies to every token.
        """
        return jnp.zeros((rows, 1, 1, self.visual_width), self.dtype)

    def media_cache(self, visual: Array) -> MediaCache:
        """What is kept of the media while a model answers: [B, M, R, O] -> the keys and values of every gated layer."""
        slots, visual = visual.shape[1], visual.reshape(visual.shape[0], -1, visual.shape[-1])
        of_layer = lambda params: tuple(
            constrain(x, "batch", "length", "heads", "head")
            for x in self.block.apply({"params": params}, visual, method="keys_values")
        )
        if isinstance(self.layers, tuple):
            return MediaCache(tuple(of_layer(params) for params in self.layers), slots)
        return MediaCache(jax.vmap(of_layer)(self.layers), slots)

    def inputs(
        self, x: Array, batch: Batch, *, visual: Array | None, media_cache: MediaCache | None, return_attention: bool
    ) -> LanguageInputs:
        """Embeddings [B, T, D] as they are, and the gated layers between those of the language model, see `interleaved`."""
        layers = self.interleaved(
            batch.media_first,
            batch.media_last,
            visual=None if media_cache is not None else visual,
            media_cache=media_cache,
            segments=batch.segments,
            return_attention=return_attention,
        )
        return LanguageInputs(x, layers)

    def interleaved(
        self,
        media_first: Array,
        media_last: Array,
        *,
        visual: Array | None = None,
        media_cache: MediaCache | None = None,
        segments: Array | None = None,
        return_attention: bool = False,
    ) -> InterleavedLayers:
        """What stands between the language layers.

        Args:
          media_first, media_last: [B, T] int32, the image slots each token may see.
          visual: [B, M, R, O], in training: each layer makes its keys and values when it runs; or
          media_cache: what was made of them once, in generation.
          segments: [B, T] int32 of packed rows; None: one conversation a row.
          return_attention: let each layer also return where every token looks, [B, T, M * R].
        """
        if visual is not None:
            slots, visual = visual.shape[1], visual.reshape(visual.shape[0], -1, visual.shape[-1])
            tokens, kept = visual.shape[1], None
        else:
            slots, kept = media_cache.slots, media_cache.keys_values
            tokens = jax.tree.leaves(kept)[0].shape[-3]
        mask = media_mask(media_first, media_last, slots, self.config.media, segments=segments, tokens=tokens // slots)
        uniform = media_last == 0 if self.config.media == "all_previous_uniform" else None

        def apply(x: Array, layer: tuple[Any, KeyValue | None]) -> tuple[Array, Array | None]:
            params, kv = layer
            inputs = ({"params": params}, x, mask, visual, kv)
            looks = self.block.apply(*inputs, method="weights") if return_attention else None
            return self.block.apply(*inputs, uniform), looks

        layers = (self.layers, kept)
        if isinstance(self.layers, tuple):
            layers = tuple(zip(self.layers, kept or (None,) * len(self.layers), strict=True))
        config = self.config
        return InterleavedLayers(
            config.every, config.offset, layers, apply, start=config.start, within=config.place == "within"
        )
