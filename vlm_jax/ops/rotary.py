"""Rotary position embedding (Su et al. 2021), in the half-split layout of LLaMA checkpoints."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np

from vlm_jax.config import DynamicNtkScaling, LinearScaling, Llama3Scaling, LongRopeScaling, RopeConfig, YarnScaling

Array = jax.Array


def rotary_angles(config: RopeConfig, head_width: int, positions: Array, segments: Array | None = None) -> tuple[Array, Array]:
    """Cosine and sine of every angle, times the attention factor of YaRN and LongRoPE.

    The frequencies of dynamic NTK and LongRoPE follow the length of a token's sequence: one more than the greatest position
    among the tokens given that share its segment. So a packed sequence is turned as it would be alone, and a decoding step by
    the length so far; keys that are in the cache stay as they were turned. Such are the answers of transformers to one
    sequence by a model just loaded. Else it takes the greatest length of the batch for all its rows, and its dynamic NTK keeps
    the length of an earlier call until a longer one comes, or one shorter than the original maximum; here nothing is kept.

    Args:
      positions, segments: [B, T] int32; no segments: a row is one sequence.

    Returns:
      Two of [B, T, 1, Q / 2] float32.
    """
    inverse = inverse_frequencies(config, head_width)
    match config.scaling:
        case DynamicNtkScaling(factor=factor, original_max_positions=original):
            lengths = jnp.maximum(_lengths(positions, segments), original).astype(jnp.float32)
            growth = factor * lengths / original - (factor - 1)
            width = rotary_width(config, head_width)
            inverse = inverse * growth ** (-_exponents(width) * width / (width - 2))
        case LongRopeScaling(short_factors=short, long_factors=long, original_max_positions=original):
            longer = _lengths(positions, segments) > original
            inverse = jnp.where(longer, *(inverse / np.asarray(factors, np.float32) for factors in (long, short)))
    angles = positions[..., None, None].astype(jnp.float32) * inverse
    factor = getattr(config.scaling, "attention_factor", 1.0)
    return jnp.cos(angles) * factor, jnp.sin(angles) * factor


def rotate(x: Array, cos: Array, sin: Array) -> Array:
    """Turns the pairs (x[i], x[i + Q/2]) of `x` [B, T, N, H] by their angles; the numbers from Q on stay."""
    half = cos.shape[-1]
    first, second, rest = jnp.split(x.astype(jnp.float32), (half, 2 * half), axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin, rest], axis=-1).astype(x.dtype)


def rotary_width(config: RopeConfig, head_width: int) -> int:
    """Q, the part of the head width that is rotated."""
    return int(head_width * config.share)


def inverse_frequencies(config: RopeConfig, head_width: int) -> np.ndarray:
    """[Q / 2] float32, radians per position, after the scaling that is the same for every length."""
    # Rounded to float32 step by step as transformers does it, so that the angles agree to the last bit.
    width = rotary_width(config, head_width)
    inverse = (1.0 / np.power(np.float32(config.base), _exponents(width))).astype(np.float32)
    match config.scaling:
        case None | DynamicNtkScaling() | LongRopeScaling():
            return inverse
        case LinearScaling(factor=factor):
            return inverse / np.float32(factor)
        case Llama3Scaling():
            return _llama3(inverse, config.scaling)
        case YarnScaling():
            return _yarn(inverse, config.base, width, config.scaling)
    raise ValueError(f"unknown RoPE scaling {config.scaling!r}")


def _exponents(width: int) -> np.ndarray:
    return np.arange(0, width, 2, dtype=np.float32) / np.float32(width)


def _lengths(positions: Array, segments: Array | None) -> Array:
    """How long the sequence of each token is: [B, T, 1, 1]."""
    same = True if segments is None else segments[:, :, None] == segments[:, None, :]
    return 1 + jnp.max(jnp.where(same, positions[:, None, :], 0), axis=-1)[..., None, None]


def _llama3(inverse: np.ndarray, scaling: Llama3Scaling) -> np.ndarray:
    """Low frequencies are divided by `factor`, high ones kept, those between interpolated."""
    wavelength = 2 * math.pi / inverse
    turns = scaling.original_max_positions / wavelength
    smooth = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    smooth = np.clip(smooth, 0.0, 1.0)
    return ((1 - smooth) * inverse / scaling.factor + smooth * inverse).astype(np.float32)


def _yarn(inverse: np.ndarray, base: float, width: int, scaling: YarnScaling) -> np.ndarray:
    """As `_llama3`, but interpolated along the number of the frequency, not along its turns."""

    def place(turns: float) -> float:
        """The number of the frequency that turns so often within the original context."""
        return width * math.log(scaling.original_max_positions / (turns * 2 * math.pi)) / (2 * math.log(base))

    low, high = place(scaling.beta_fast), place(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, width - 1)
    ramp = (np.arange(len(inverse), dtype=np.float32) - low) / ((high - low) or 0.001)
    ramp = np.clip(ramp, 0.0, 1.0)
    return (inverse / scaling.factor * ramp + inverse * (1 - ramp)).astype(np.float32)
