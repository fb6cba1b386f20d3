"""Kernels in int8 with a scale for every output (LLM.int8(), Dettmers et al. 2022, arXiv 2208.07339, without its outliers).

Only weights are held so; a product is of floating-point numbers.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp

Array = jax.Array


def quantise(kernel: Array, inputs: Sequence[int]) -> tuple[Array, Array]:
    """A kernel -> int8 from -127 to 127, and float32 scales by which it is multiplied again.

    The largest number of an output becomes 127, so that what was dequantised is quantised to the same again.

    Args:
      inputs: the axes that a product contracts: a scale is of all numbers along them, and has size 1 there.
    """
    kernel = kernel.astype(jnp.float32)
    largest = jnp.max(jnp.abs(kernel), axis=tuple(inputs), keepdims=True)
    scale = jnp.where(largest > 0, largest / 127, 1.0)
    return jnp.round(kernel / scale).astype(jnp.int8), scale


def dequantise(kernel: Array, scale: Array) -> Array:
    """The inverse of `quantise`, float32; each number is off by at most half its scale."""
    return kernel.astype(jnp.float32) * scale


def int8_product(x: Array, kernel: Array, scale: Array) -> Array:
    """x [..., D] times a kernel [D, F] int8 with scales [F]: [..., F], in the type of x."""

    def product(x: Array, kernel: Array, scale: Array) -> Array:
        return (x @ kernel.astype(x.dtype)) * scale.astype(x.dtype)

    # The backward pass casts the kernel again: a scan over layers would keep the cast kernels of all of them for it.
    return jax.checkpoint(product, prevent_cse=False)(x, kernel, scale)
