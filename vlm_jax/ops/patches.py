"""Images as patches, and position embeddings for other resolutions."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array


def normalised(images: Array, mean: tuple[float, ...], std: tuple[float, ...]) -> Array:
    """uint8 RGB [..., 3] -> float32, less `mean` and by `std`, which are of pixels in 0..1."""
    mean, std = (jnp.asarray(value, jnp.float32) for value in (mean, std))
    return (images.astype(jnp.float32) / 255.0 - mean) / std


def patchify(images: Array, patch: int) -> Array:
    """[B, height, width, 3] -> [B, P, patch * patch * 3], row-major; pixels of a patch in the order (row, column, channel).

    Raises:
      ValueError: a side is not a multiple of `patch`.
    """
    batch, height, width, channels = images.shape
    if height % patch or width % patch:
        raise ValueError(f"image of {height}x{width} pixels does not divide into patches of {patch}")
    rows, columns = height // patch, width // patch
    x = images.reshape(batch, rows, patch, columns, patch, channels)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(batch, rows * columns, patch * patch * channels)


def resize_positions(table: Array, grid: tuple[int, int], antialias: bool = False) -> Array:
    """A square table of patch positions [P, D], resized to `grid` (rows, columns): [rows * columns, D].

    Bicubic with half-pixel centres, as `torch.nn.functional.interpolate` has it in transformers' vision towers: a = -0.75
    without antialiasing, and Pillow's a = -0.5 with it.
    """
    side = int(table.shape[0] ** 0.5)
    if grid == (side, side):
        return table
    square = table.reshape(side, side, -1)
    if antialias:
        return jax.image.resize(square, (*grid, square.shape[-1]), "cubic").reshape(grid[0] * grid[1], -1)
    rows, columns = (_cubic_matrix(side, size) for size in grid)
    return jnp.einsum("rh,cw,hwd->rcd", rows, columns, square).reshape(grid[0] * grid[1], -1)


def patch_mask(sizes: Array, grid: tuple[int, int]) -> Array:
    """Which patches of `grid` pictures of `sizes` patches [B, 2] (rows, columns) have in its upper left: [B, P] bool."""
    rows, columns = (jnp.arange(grid[axis]) < sizes[:, axis, None] for axis in (0, 1))
    return (rows[:, :, None] & columns[:, None]).reshape(sizes.shape[0], -1)


def bucketed_positions(sizes: Array, grid: tuple[int, int], side: int) -> Array:
    """For pictures of `sizes` patches [B, 2] (rows, columns) in the upper left of `grid`: places in a table, [B, P] int32.

    A patch that lies a share `f` of the picture's height down takes row `floor(f * side)` of a learned square; likewise
    columns. The shares are float32, as transformers' `Idefics2VisionEmbeddings` has them.

    Args:
      side: of the learned table, of `side` * `side` places.
    """
    buckets = jnp.asarray(_buckets(max(grid), side))
    rows, columns = (buckets[sizes[:, axis], : grid[axis]] for axis in (0, 1))
    return (rows[:, :, None] * side + columns[:, None]).reshape(sizes.shape[0], -1)


def _buckets(most: int, side: int) -> np.ndarray:
    """[most + 1, most] int32: of a picture so many patches long, the bucket of each patch."""
    lengths = np.maximum(np.arange(most + 1), 1).astype(np.float32)
    shares = np.arange(most, dtype=np.float32) * (np.float32(1) / lengths)[:, None]
    found = np.searchsorted(_boundaries(side), np.minimum(shares, np.float32(1.0 - 1e-6)), side="right")
    return np.minimum(found, side - 1).astype(np.int32)


def _boundaries(side: int, block: int = 8) -> np.ndarray:
    """Where the buckets 1, 2, ... begin: 1 / side, 2 / side, ..., float32 to the last bit as `torch.arange` makes them on x86.

    A picture as long as the table has a patch on every boundary, so that one bit decides its row. torch rounds the first of
    every eight before it goes on from there, as long as there are twice eight to come, and counts the rest from the start.
    """
    step = 1 / side
    places = np.arange(len(np.arange(step, 1.0, step)))
    exact = step + places * step
    first = exact[places // block * block].astype(np.float32)
    blocked = first.astype(np.float64) + places % block * step
    whole = len(places) // (2 * block) * (2 * block)
    return np.where(places < whole, blocked, exact).astype(np.float32)


def _cubic_matrix(source: int, target: int, a: float = -0.75) -> Array:
    """[target, source] interpolation weights; jax.image.resize offers a = -0.5 alone."""
    centre = (jnp.arange(target) + 0.5) * (source / target) - 0.5
    base = jnp.floor(centre).astype(jnp.int32)
    taps = base[:, None] + jnp.arange(-1, 3)
    distance = jnp.abs(centre[:, None] - taps)
    near = ((a + 2) * distance - (a + 3)) * distance**2 + 1
    far = ((distance - 5) * distance + 8) * distance * a - 4 * a
    weights = jnp.where(distance <= 1, near, far)
    one_hot = jax.nn.one_hot(jnp.clip(taps, 0, source - 1), source)
    return jnp.einsum("tk,tks->ts", weights, one_hot)
