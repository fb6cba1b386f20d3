"""What the tests of the data room share."""

import json
import types
from pathlib import Path

import numpy as np
from PIL import Image

from vlm_jax.config import DataConfig
from vlm_jax.data.pipeline import build_source, build_tokenizer

TEXTS = ["what color is the shape?", " red", " no", "is there a circle in the image?"] * 4


def write_lines(path: Path, records: list) -> Path:
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in records))
    return path


def picture(path: Path, colour=(200, 30, 10), size=(8, 8)) -> Path:
    Image.new("RGB", size, colour).save(path)
    return path


def random_pixels(height: int, width: int, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, channels)).astype(np.uint8)


def run_config(data: DataConfig, steps=6, seed=0):
    """The fields of RunConfig that are read here."""
    return types.SimpleNamespace(data=data, seed=seed, steps=steps)


def parts(data: DataConfig):
    source = build_source(data, "train")
    return build_tokenizer(data, source), source
