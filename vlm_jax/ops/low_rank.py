"""LoRA's product (Hu et al. 2021, arXiv 2106.09685): what an adapter adds to a linear map."""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp

Array = jax.Array


def low_rank(x: Array, a: Array, b: Array, scale: Array, dropout: Mapping[str, Array] | None = None) -> Array:
    """scale * dropout(x) A B, as two small products: [..., D] -> [..., F], in the type of x.

    Args:
      x: [..., D].
      a: of D numbers times the rank, in any number of axes, the rank last; b: of the rank first, and F numbers.
      scale: [], alpha over the rank.
      dropout: in training alone, `key`, and `rate`, the share of x that is left out; the rest grows by 1 / (1 - rate).
    """
    rank = a.shape[-1]
    if dropout is not None:
        keep = 1.0 - dropout["rate"]
        kept = jax.random.bernoulli(dropout["key"], keep, x.shape)
        x = jnp.where(kept, x / keep.astype(x.dtype), jnp.zeros((), x.dtype))
    y = (x @ a.astype(x.dtype).reshape(-1, rank)) @ b.astype(x.dtype).reshape(rank, -1)
    return y * scale.astype(x.dtype)
