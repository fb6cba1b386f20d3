"""The parameters that every part is made of: linear maps, norms and tables, with named axes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from vlm_jax.config import NormConfig
from vlm_jax.ops.low_rank import low_rank
from vlm_jax.ops.quantised import int8_product
from vlm_jax.sharding import named

Array = jax.Array
Dtype = Any


class Linear(nn.Module):
    """x W + b, contracting the last `len(inputs)` axes of x.

    `inputs` and `outputs` map logical axis names to sizes: `Linear({"embed": 512}, {"heads": 8, "head": 64})` holds a
    kernel [512, 8, 64].

    Beside a kernel the parameters may hold what `init` does not make: `kernel_scale`, the scales of a kernel held in int8, and
    `lora/NAME`, adapters (`ops/low_rank.py`), all of which are added.
    """

    inputs: Mapping[str, int]
    outputs: Mapping[str, int]
    bias: bool
    dtype: Dtype
    init_gain: float = 1.0  # times LeCun's deviation

    @nn.compact
    def __call__(self, x: Array) -> Array:
        inputs, outputs = tuple(self.inputs.values()), tuple(self.outputs.values())
        rank = len(inputs) + len(outputs)
        axes = range(len(inputs)), range(len(inputs), rank)
        init = nn.initializers.variance_scaling(self.init_gain**2, "fan_in", "truncated_normal", *axes)
        kernel = self.param("kernel", named(init, *self.inputs, *self.outputs, inputs=len(inputs)), inputs + outputs)
        # One plain matrix product: the form every backend has its best kernel for.
        matrix = kernel.reshape(math.prod(inputs), math.prod(outputs))
        lead = x.shape[: x.ndim - len(inputs)]
        x = x.astype(self.dtype).reshape(*lead, math.prod(inputs))
        if self.has_variable("params", "kernel_scale"):
            y = int8_product(x, matrix, self.get_variable("params", "kernel_scale").reshape(-1))
        else:
            y = x @ matrix.astype(self.dtype)
        if self.has_variable("params", "lora"):
            for adapter in self.get_variable("params", "lora").values():
                y = y + low_rank(x, **adapter)
        if self.bias:
            bias = self.param("bias", named(nn.initializers.zeros, *self.outputs), outputs)
            y = y + bias.astype(self.dtype).reshape(-1)
        return y.reshape(*lead, *outputs)


class Norm(nn.Module):
    """Layer norm or RMSNorm over the last axis, computed in float32."""

    config: NormConfig
    width: int
    dtype: Dtype

    @nn.compact
    def __call__(self, x: Array) -> Array:
        config = self.config
        init = nn.initializers.zeros if config.plus_one else nn.initializers.ones
        scale = self.param("scale", named(init, "norm"), (self.width,)) + float(config.plus_one)
        x = x.astype(jnp.float32)
        if config.kind == "layer":
            x = x - jnp.mean(x, axis=-1, keepdims=True)
        x = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + config.eps) * scale
        if config.kind == "layer" and config.bias:
            x = x + self.param("bias", named(nn.initializers.zeros, "norm"), (self.width,))
        return x.astype(self.dtype)
