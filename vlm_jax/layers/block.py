"""The transformer block: attention, feed-forward, and the two put together."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from vlm_jax.config import Activation, BlockConfig, NormConfig
from vlm_jax.layers.linear import Linear, Norm
from vlm_jax.layers.moe import MixtureOfExperts
from vlm_jax.ops.activations import ACTIVATIONS
from vlm_jax.ops.attention import attend
from vlm_jax.ops.attention_dense import attention_weights
from vlm_jax.ops.masks import Mask
from vlm_jax.sharding import constrain, named

Array = jax.Array
Dtype = Any
KeyValue = tuple[Array, Array]  # keys and values, each [B, S, K, H]


class Attention(nn.Module):
    """Multi-head attention of `width` over keys and values from `kv_width`.

    The projections are methods of their own, so that keys and values can be cached, rotated, or made once from an image.
    """

    width: int
    kv_width: int
    heads: int
    kv_heads: int
    head_width: int
    dtype: Dtype
    qkv_bias: bool = False
    out_bias: bool = False
    qk_norm: NormConfig | None = None
    qk_norm_over: Literal["head", "width"] = "head"  # each head by itself, or all of them as one vector
    query_init: float = 1.0

    def setup(self) -> None:
        head = {"head": self.head_width}
        make = lambda inputs, outputs, bias, gain=1.0: Linear(inputs, outputs, bias, self.dtype, gain)
        self.query = make({"embed": self.width}, {"heads": self.heads} | head, self.qkv_bias, self.query_init)
        self.key = make({"embed": self.kv_width}, {"kv_heads": self.kv_heads} | head, self.qkv_bias)
        self.value = make({"embed": self.kv_width}, {"kv_heads": self.kv_heads} | head, self.qkv_bias)
        self.out = make({"heads": self.heads} | head, {"embed": self.width}, self.out_bias)
        if self.qk_norm:
            of = lambda heads: self.head_width * (heads if self.qk_norm_over == "width" else 1)
            self.query_norm = Norm(self.qk_norm, of(self.heads), self.dtype)
            self.key_norm = Norm(self.qk_norm, of(self.kv_heads), self.dtype)

    def queries(self, x: Array) -> Array:
        """[B, T, D] -> [B, T, N, H]."""
        q = self.query(x)
        q = self._normed(self.query_norm, q) if self.qk_norm else q
        return constrain(q, "batch", "length", "heads", "head")

    def keys_values(self, x: Array) -> KeyValue:
        """[B, S, O] -> two of [B, S, K, H]."""
        k = self.key(x)
        k = self._normed(self.key_norm, k) if self.qk_norm else k
        return tuple(constrain(y, "batch", "length", "kv_heads", "head") for y in (k, self.value(x)))

    def _normed(self, norm: Norm, x: Array) -> Array:
        """[B, T, N, H] -> the same, normalised over H, or over N and H together."""
        if self.qk_norm_over == "head":
            return norm(x)
        return norm(x.reshape(*x.shape[:-2], -1)).reshape(x.shape)

    def output(self, y: Array) -> Array:
        """[B, T, N, H] -> [B, T, D]."""
        return constrain(self.out(y), "batch", "length", None)

    def weights(self, x: Array, kv: KeyValue, mask: Mask | None = None) -> Array:
        """Where `x` looks: [B, T, S] float32, the mean over the heads."""
        return jnp.mean(attention_weights(self.queries(x), kv[0], mask), axis=1)

    def __call__(self, x: Array, kv: KeyValue, mask: Mask | None = None) -> Array:
        """Cross-attention of `x` [B, T, D] over `kv`."""
        return self.output(attend(self.queries(x), *kv, mask))


class Mlp(nn.Module):
    """Two linear maps with an activation between; gated: down(act(gate x) * up x) (Shazeer 2020)."""

    width: int
    hidden: int
    activation: Activation
    gated: bool
    bias: bool
    dtype: Dtype
    outputs: int | None = None  # the width that leaves; None: `width`

    @nn.compact
    def __call__(self, x: Array) -> Array:
        wide = lambda name: Linear({"embed": self.width}, {"mlp": self.hidden}, self.bias, self.dtype, name=name)
        activation = ACTIVATIONS[self.activation]
        hidden = activation(wide("gate")(x)) * wide("up")(x) if self.gated else activation(wide("up")(x))
        y = Linear({"mlp": self.hidden}, {"embed": self.outputs or self.width}, self.bias, self.dtype, name="down")(hidden)
        return constrain(y, "batch", "length", None)


class Block(nn.Module):
    """x + attention(norm x), then x + mlp(norm x); with `parallel_residual` x + attention(norm x) + mlp(norm x).

    The two norms differ, but with `shared_norm`. With `post_norm`: norm(x + attention(x)), then norm(x + mlp(x)).

    What the attention does with its queries, keys and values (rotary, mask, cache) is the caller's: `attention_of` takes
    (q [B, T, N, H], k, v [B, T, K, H]) to (y [B, T, N, H], anything). Beside the output the anything is returned, and by name
    what an objective or a report may want to know of the layer: "router_logits" [B, T, E] of a mixture of experts.
    """

    config: BlockConfig
    dtype: Dtype

    @nn.compact
    def __call__(
        self,
        x: Array,
        attention_of: Callable[[Array, Array, Array], tuple[Array, Any]],
        between: Callable[[Array], Array] | None = None,
    ) -> tuple[Array, Any, dict[str, Array]]:
        """
        Args:
          between: what is done with x [B, T, D] after the attention and before the feed-forward; None: nothing.
        """
        config = self.config
        if between is not None and (config.parallel_residual or config.post_norm):
            raise ValueError("nothing can stand within a block of parallel_residual=True or post_norm=True")
        if config.post_norm and (config.parallel_residual or config.shared_norm):
            raise ValueError("post_norm=True: its norms stand behind two sums; set parallel_residual and shared_norm to False")
        norm = lambda name, x: Norm(config.norm, config.width, self.dtype, name=name)(x)
        before = lambda name, x: x if config.post_norm else norm(name, x)
        behind = lambda name, x: norm(name, x) if config.post_norm else x
        attention = Attention(
            config.width,
            config.width,
            config.heads,
            config.kv_heads,
            config.head_width,
            self.dtype,
            config.qkv_bias,
            config.out_bias,
            qk_norm=config.norm if config.qk_norm else None,
            qk_norm_over="width",
            query_init=config.query_init,
            name="attention",
        )
        normed = before("attention_norm", x)
        y, extra = attention_of(attention.queries(normed), *attention.keys_values(normed))
        attended = behind("attention_norm", x + self._scaled("attention_scale", attention.output(y)))
        attended = attended if between is None else between(attended)
        x = x if config.parallel_residual else attended
        if not config.shared_norm:
            normed = before("mlp_norm", x)
        y, aux = self._feed_forward(normed)
        return behind("mlp_norm", attended + self._scaled("mlp_scale", y)), extra, aux

    def _feed_forward(self, x: Array) -> tuple[Array, dict[str, Array]]:
        config = self.config
        if config.experts is not None:
            y, logits = MixtureOfExperts(config, self.dtype, name="mlp")(x)
            return y, {"router_logits": logits}
        sizes = (config.width, config.mlp_width, config.activation, config.gated_mlp, config.mlp_bias)
        return Mlp(*sizes, self.dtype, name="mlp")(x), {}

    def _scaled(self, name: str, y: Array) -> Array:
        if not self.config.layer_scale:
            return y
        # Small at first, as DINOv2's: a deep stack begins near the identity.
        factor = self.param(name, named(nn.initializers.constant(0.1), "norm"), (self.config.width,))
        return y * factor.astype(y.dtype)
