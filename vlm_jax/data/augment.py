"""Random changes of the pictures that are trained on."""

from __future__ import annotations

import numpy as np

from vlm_jax.config import AugmentConfig


def augment(image: np.ndarray, config: AugmentConfig, rng: np.random.Generator) -> np.ndarray:
    """Flips, shifts and recolours at random, as far as `config` says.

    Args:
      image: [side, side, channels] uint8; 3 channels, or 3 for each frame of a video: all get the same augmentation.

    Returns:
      [side, side, channels] uint8; a new array unless nothing was done.
    """
    if config.flip or config.mirror or config.shift:
        height, width = image.shape[:2]
        up_down, left_right = rng.integers(0, 2, size=2) * (config.flip, config.flip or config.mirror)
        down, right = rng.integers(-config.shift, config.shift + 1, size=2)
        # The border is repeated: places behind it read it again.
        rows = np.minimum(np.maximum(np.arange(height) - down, 0), height - 1)
        columns = np.minimum(np.maximum(np.arange(width) - right, 0), width - 1)
        image = image.take(rows[:: -1 if up_down else 1], axis=0).take(columns[:: -1 if left_right else 1], axis=1)
    if config.colour:
        brightness, contrast = rng.uniform(-config.colour, config.colour, size=2)
        mean = image.mean()
        # One table of 256 values is cheaper than arithmetic on every pixel.
        table = (np.arange(256) - mean) * (1 + contrast) + mean * (1 + brightness)
        image = np.round(table).clip(0, 255).astype(np.uint8)[image]
    return image
