"""Normaliser-free networks (Brock et al. 2021), as timm's `dm_nfnet_f0` to `dm_nfnet_f6`: the vision encoder of Flamingo."""

from __future__ import annotations

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from vlm_jax.config import NfnetConfig
from vlm_jax.config.register import MODULES
from vlm_jax.layers.linear import Linear
from vlm_jax.layers.stack import rematerialised, stacked
from vlm_jax.ops.patches import normalised
from vlm_jax.sharding import constrain, named

Array = jax.Array

# The deviation of GELU of a standard normal variable is 1 / GAIN: with it, activations keep a variance of 1.
GAIN = 1.7015043497085571
SQUEEZE_GAIN = 2.0  # the gate of squeeze-and-excitation halves what passes
EPS = 1e-5  # of the variance of a kernel


def _activation(x: Array) -> Array:
    return nn.gelu(x, approximate=False) * jnp.asarray(GAIN, x.dtype)


class StandardConv(nn.Module):
    """A convolution whose kernel has mean 0 and variance 1 / inputs for every output, times a learned gain.

    [B, height, width, inputs] -> [B, height / stride, width / stride, outputs], rounded up.
    """

    inputs: int
    outputs: int
    size: int
    dtype: Any
    stride: int = 1
    groups: int = 1

    @nn.compact
    def __call__(self, x: Array) -> Array:
        shape = (self.size, self.size, self.inputs // self.groups, self.outputs)
        fan_in = math.prod(shape[:-1])
        init = nn.initializers.variance_scaling(1.0, "fan_in", "normal", in_axis=(0, 1, 2), out_axis=3)
        kernel = self.param("kernel", named(init, None, None, None, "embed"), shape)
        gain = self.param("gain", named(nn.initializers.ones, "norm"), (self.outputs,))
        bias = self.param("bias", named(nn.initializers.zeros, "norm"), (self.outputs,))
        kernel = kernel.astype(jnp.float32)
        axes = (0, 1, 2)
        kernel = kernel - jnp.mean(kernel, axis=axes, keepdims=True)
        scale = jax.lax.rsqrt(jnp.mean(jnp.square(kernel), axis=axes, keepdims=True) + EPS)
        kernel = kernel * (scale * gain.astype(jnp.float32) * fan_in**-0.5)
        y = jax.lax.conv_general_dilated(
            x.astype(self.dtype),
            kernel.astype(self.dtype),
            window_strides=(self.stride, self.stride),
            padding="SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=self.groups,
        )
        return constrain(y + bias.astype(self.dtype), "batch", None, None, None)


class SqueezeExcite(nn.Module):
    """Each channel times a gate, made of the means of all channels over the picture (Hu et al. 2018)."""

    width: int
    hidden: int
    dtype: Any

    @nn.compact
    def __call__(self, x: Array) -> Array:
        y = jnp.mean(x, axis=(1, 2))
        linear = lambda name, inputs, outputs: Linear(inputs, outputs, bias=True, dtype=self.dtype, name=name)
        y = nn.relu(linear("down", {"embed": self.width}, {"mlp": self.hidden})(y))
        y = nn.sigmoid(linear("up", {"mlp": self.hidden}, {"embed": self.width})(y))
        return x * y[:, None, None]


class NfnetBlock(nn.Module):
    """x + alpha * gain * residual(activation(x) * beta): 1 x 1, two 3 x 3 in groups, 1 x 1, squeeze-and-excitation.

    `beta` makes the variance 1 again, which grows by alpha^2 with every block before.
    """

    config: NfnetConfig
    inputs: int
    outputs: int
    dtype: Any
    stride: int = 1

    @nn.compact
    def __call__(self, x: Array, beta: Array) -> Array:
        config = self.config
        groups = int(self.outputs * config.bottleneck) // config.group_width
        middle = groups * config.group_width
        conv = lambda name, *sizes, **rest: StandardConv(*sizes, dtype=self.dtype, name=name, **rest)
        y = _activation(x) * jnp.asarray(beta, x.dtype)
        shortcut = x
        if self.stride > 1 or self.inputs != self.outputs:
            shortcut = y
            if self.stride > 1:
                window = (self.stride, self.stride)
                shortcut = nn.avg_pool(y, window, strides=window, padding="SAME", count_include_pad=False)
            shortcut = conv("shortcut", self.inputs, self.outputs, 1)(shortcut)
        y = conv("narrow", self.inputs, middle, 1)(y)
        y = conv("mix_0", middle, middle, 3, stride=self.stride, groups=groups)(_activation(y))
        y = conv("mix_1", middle, middle, 3, groups=groups)(_activation(y))
        y = conv("wide", middle, self.outputs, 1)(_activation(y))
        y = SQUEEZE_GAIN * SqueezeExcite(self.outputs, int(self.outputs * config.squeeze), self.dtype, name="squeeze")(y)
        gain = self.param("gain", named(nn.initializers.zeros), ())
        return y * (gain * config.alpha).astype(y.dtype) + shortcut


@MODULES.add(NfnetConfig)
class Nfnet(nn.Module):
    """Images [B, height, width, 3] uint8 -> features [B, P, O], row by row of a grid of one for 32 x 32 pixels."""

    config: NfnetConfig
    dtype: Any
    remat: str = "none"

    @nn.nowrap
    def example(self) -> tuple[np.ndarray]:
        """The least input that makes all parameters."""
        return (np.zeros((1, self.config.image_size, self.config.image_size, 3), np.uint8),)

    @nn.compact
    def __call__(self, images: Array, sizes: Array | None = None) -> Array:
        """
        Raises:
          ValueError: `sizes`: all pictures of a batch have one size.
        """
        config = self.config
        if sizes is not None:
            raise ValueError("an NFNet reads pictures of one size; resize or pad them")
        x = normalised(images, config.mean, config.std).astype(self.dtype)
        width, widths = 3, [config.stem_width // share for share in (8, 4, 2, 1)]
        for number, (outputs, stride) in enumerate(zip(widths, (2, 1, 1, 2), strict=True)):
            x = _activation(x) if number else x
            x = StandardConv(width, outputs, 3, stride=stride, dtype=self.dtype, name=f"stem_{number}")(x)
            width = outputs
        variance = 1.0
        for stage, (depth, outputs) in enumerate(zip(config.depths, config.channels, strict=True)):
            first = NfnetBlock(config, width, outputs, self.dtype, stride=2 if stage else 1, name=f"stage_{stage}_first")
            x = first(x, jnp.asarray(variance**-0.5, jnp.float32))
            # The first block of a stage sets the variance back: its shortcut is made of what was normalised.
            betas = [(1.0 + number * config.alpha**2) ** -0.5 for number in range(1, depth)]
            variance, width = 1.0 + depth * config.alpha**2, outputs
            if depth > 1:
                x = self._rest(x, f"stage_{stage}", outputs, jnp.asarray(betas, jnp.float32))
        if config.final_width is not None:
            x = StandardConv(width, config.final_width, 1, dtype=self.dtype, name="final")(x)
        x = _activation(x)
        return x.reshape(x.shape[0], -1, x.shape[-1])

    def _rest(self, x: Array, name: str, width: int, betas: Array) -> Array:
        """The blocks of a stage behind the first, all of one shape."""
        block = NfnetBlock(self.config, width, width, self.dtype, parent=None)
        params = stacked(self, name, block, len(betas), jnp.zeros((1, 1, 1, width)), jnp.zeros(()))

        def layer(x: Array, one: tuple[Any, Array]) -> tuple[Array, None]:
            params, beta = one
            return block.apply({"params": params}, x, beta), None

        return jax.lax.scan(rematerialised(layer, self.remat), x, (params, betas))[0]
