"""Data sets that others published, as they published them."""

from __future__ import annotations

from typing import Literal

from vlm_jax.config.data import SourceConfig
from vlm_jax.config.frozen import frozen


@frozen
class TarConfig(SourceConfig):
    """Tar shards in webdataset's layout, as img2dataset writes them: see `vlm_jax/data/sources/tar.py`."""

    kind: Literal["tar"] = "tar"
    train: str  # a file, or several: "shards/*.tar", "shards/{00000..00199}.tar"
    eval: str
    bad_lines: Literal["error", "skip"] = "error"  # skip: counted and reported
