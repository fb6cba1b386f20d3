"""The features of a run's frozen vision encoder, kept on disk beside the tokens (`data/features.py`)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np

from vlm_jax.config import AugmentConfig, DataConfig, RunConfig
from vlm_jax.data.example import Source
from vlm_jax.data.features import FeatureStore, feature_store
from vlm_jax.data.pipeline import tokens_of
from vlm_jax.data.rows import RowMaker
from vlm_jax.paths import by_path, nested
from vlm_jax.processing.processor import Processor
from vlm_jax.sharding import batch_sharding, batch_shards
from vlm_jax.training.checkpoint import fingerprint
from vlm_jax.training.step import Trainer, TrainState

ROWS = 32  # tiles that are encoded at once


def check_cacheable(trainer: Trainer) -> None:
    """
    Raises:
      ValueError: features that would differ from step to step, or a model that has none.
    """
    config = trainer.config
    trained = [
        path for path, rule in trainer.rules.items() if path.startswith(f"{config.model.vision_path}/") and not rule.frozen
    ]
    if not config.model.has_vision or config.model.reads_shapes:
        raise ValueError("config.data.cache_features=True: the model needs a vision encoder whose pictures have one size")
    if trained:
        raise ValueError(
            f"config.data.cache_features=True: the vision encoder is trained ({trained[0]} and {len(trained) - 1} more): "
            "freeze it by config.optimizer.rules, or set cache_features=False"
        )
    if any(one.data.augment != AugmentConfig() for one in config.data_sets if one.data.cache_features):
        raise ValueError("config.data.cache_features=True: augmented pictures always differ: leave config.data.augment out")
    if jax.process_count() > 1:
        raise ValueError("config.data.cache_features=True: features are computed by one process; train in one")


def features_of(
    trainer: Trainer, state: TrainState, source: Source, *, processor: Processor, data: DataConfig | None = None
) -> FeatureStore:
    """The features of all pictures of a source, computed on the mesh unless they are on disk.

    Args:
      data: how the source is read; None: as the run's own data are.

    Raises:
      DataError: a picture cannot be read, or the cache cannot be written.
    """
    config: RunConfig = trainer.config
    data = config.data if data is None else data
    params = state.params  # those that are not needed are not computed with
    path = f"{config.model.vision_path}/"
    vision = nested({name: leaf for name, leaf in by_path(state.frozen).items() if name.startswith(path)})
    shards = batch_shards(trainer.mesh)
    rows = -(-ROWS // shards) * shards

    def encode(images: np.ndarray) -> np.ndarray:
        return np.asarray(trainer.cached_features(params, jax.device_put(images, batch_sharding(trainer.mesh))), np.float32)

    store = tokens_of(data, processor, source)
    maker = RowMaker(data, store, source, processor.spread, seed=None)
    key: tuple[Any, ...] = (
        int(jax.jit(fingerprint)(vision)),
        config.model.cached_by,
        str(trainer.model.dtype),
        source.fingerprint,
        processor.fingerprint,
    )
    cache = Path(data.cache_dir).expanduser()
    return feature_store(cache, store, key=key, tiles_of=maker.tiles, encode=encode, rows=rows)
