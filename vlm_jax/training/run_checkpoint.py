"""A run of train.py as a checkpoint that is loaded, and written for others."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
from jax.sharding import Mesh

from vlm_jax.config.register import module_of
from vlm_jax.errors import RequestError
from vlm_jax.interop.peft import own_table
from vlm_jax.interop.peft_write import write_adapter
from vlm_jax.interop.published import open_published
from vlm_jax.interop.table import Table
from vlm_jax.layers.lora import dequantised, merged
from vlm_jax.paths import by_path
from vlm_jax.runtime import compute_dtype
from vlm_jax.sharding import boxed_params
from vlm_jax.training.checkpoint import load_run
from vlm_jax.training.params import Blueprint
from vlm_jax.training.processors import run_processor, write_processing
from vlm_jax.training.run_folder import PUBLISHED, read_config

log = logging.getLogger(__name__)


class RunCheckpoint:
    """A run of train.py (its `--workdir`), with its configuration read and its weights not yet.

    Attributes:
      config: of the run.
    """

    def __init__(self, folder: Path, step: int | None) -> None:
        self.folder, self.step = folder, step
        self.config = read_config(folder)
        self.processor = run_processor(self.config.data, folder)

    def load(
        self, mesh: Mesh, dtype: str | None = None, *, progress: Callable[[int, int], None] = lambda done, total: None
    ) -> tuple[nn.Module, Any]:
        """The model, and its parameters on the mesh.

        Args:
          dtype: None: the run's own.
          progress: not called: runs are read without one.
        """
        compute = compute_dtype(dtype or self.config.dtype)
        run = load_run(self.folder, mesh, dtype=compute if compute != "float32" or dtype else None, step=self.step)
        self.step = run.step
        return module_of(run.config.model)(run.config.model, compute), run.params

    def convert(self, folder: str | Path, mesh: Mesh) -> int:
        """Writes the run's parameters in the format of the published checkpoint it was started from.

        Raises:
          RequestError: it was not started from one.
        """
        origin = self.folder / PUBLISHED
        if not origin.is_dir():
            raise RequestError(
                f"{self.folder} was not started from a published checkpoint (config.init_from), so there is no published "
                "configuration to export it under"
            )
        published = open_published(origin, pickles=self.config.pickles)
        params = load_run(self.folder, mesh, step=self.step).params
        if any(path.endswith("/kernel_scale") for path in by_path(params)):
            log.warning("%s: the int8 kernels of the run are written as float32", folder)
        written = published.export(jax.jit(lambda params: dequantised(merged(params)))(params), folder)
        write_processing(self.config.data, Path(folder))
        return written

    def adapter_tables(self, boxes: Mapping[str, Any]) -> tuple[Table, ...]:
        """As `Checkpoint.adapter_tables`; the last has our own names."""
        origin = self.folder / PUBLISHED
        published = open_published(origin, pickles=self.config.pickles).tables if origin.is_dir() else ()
        return (*published, own_table(boxes))

    def write_adapter(self, folder: str | Path, name: str, mesh: Mesh) -> int:
        """Writes an adapter alone, with what was trained beside it; see `interop/peft.py`.

        Raises:
          PublishedError: there is none of the name, or PEFT's format cannot hold it.
        """
        config = self.config
        model = module_of(config.model)(config.model)
        boxes = by_path(boxed_params(model))
        rules = Blueprint.of(model, config.optimizer.rules, mesh, config.adapters).rules
        return write_adapter(
            folder,
            name,
            load_run(self.folder, mesh, step=self.step).params,
            self.adapter_tables(boxes)[0],
            boxes,
            also=[path for path in boxes if not rules[path].frozen],
            dropout=next((one.dropout for one in config.adapters if one.name == name), 0.0),
            base=config.init_from or None,
        )
