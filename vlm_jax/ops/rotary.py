"""Rotary position embedding (Su et al. 2021), in the half-split layout of LLaMA checkpoints.

Axis letters: B batch, T tokens, N heads, H head width.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np

from vlm_jax.config import LinearScaling, Llama3Scaling, RopeConfig

Array = jax.Array


def inverse_frequencies(config: RopeConfig, head_width: int) -> np.ndarray:
    """[H / 2] float32, radians per position, after scaling."""
    # Rounded to float32 step by step as transformers does it, so that the angles agree to the last bit.
    exponent = np.arange(0, head_width, 2, dtype=np.float32) / np.float32(head_width)
    inverse = (1.0 / np.power(np.float32(config.base), exponent)).astype(np.float32)
    match config.scaling:
        case None:
            return inverse
        case LinearScaling(factor=factor):
            return inverse / np.float32(factor)
        case Llama3Scaling():
            return _llama3(inverse, config.scaling)
    raise ValueError(f"unknown RoPE scaling {config.scaling!r}")


def _llama3(inverse: np.ndarray, scaling: Llama3Scaling) -> np.ndarray:
    """Low frequencies are divided by `factor`, high ones kept, those between interpolated."""
    wavelength = 2 * math.pi / inverse
    turns = scaling.original_max_positions / wavelength
    smooth = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    smooth = np.clip(smooth, 0.0, 1.0)
    return ((1 - smooth) * inverse / scaling.factor + smooth * inverse).astype(np.float32)


def rotary_angles(config: RopeConfig, head_width: int, positions: Array) -> tuple[Array, Array]:
    """Cosine and sine of every angle: positions [B, T] -> two of [B, T, 1, H / 2] float32."""
    angles = positions[..., None, None].astype(jnp.float32) * inverse_frequencies(config, head_width)
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x: Array, cos: Array, sin: Array) -> Array:
    """Turns the pairs (x[i], x[i + H/2]) of `x` [B, T, N, H] by their angles."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
