"""A published checkpoint, whatever it was opened from: a folder, a GGUF or an ONNX file."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import flax.linen as nn
import jax
from jax.sharding import Mesh

from vlm_jax.config.register import module_of
from vlm_jax.interop.engine import load_params, names_known, published_tensors
from vlm_jax.interop.files import safetensors_files
from vlm_jax.interop.files.folder import check_folder, new_folder
from vlm_jax.interop.files.settings import read_settings
from vlm_jax.interop.files.source import PublishedError, Source
from vlm_jax.interop.peft import own_table
from vlm_jax.interop.table import Table
from vlm_jax.processing.encoder_processor import EncoderProcessor
from vlm_jax.processing.processor import Processor
from vlm_jax.runtime import compute_dtype
from vlm_jax.sharding import boxed_params


class Config(Protocol):
    """The interface of a published model's configuration.

    Attributes:
      answers: whether the model generates text; has_vision: whether it reads images.
    """

    @property
    def answers(self) -> bool: ...

    @property
    def has_vision(self) -> bool: ...

    def with_pixels(self, mean: tuple[float, ...], std: tuple[float, ...]) -> Config:
        """The same, with pixels normalised by this mean and standard deviation."""
        ...

    def part(self, params: Any, name: str) -> Any:
        """The parameters that start part `name` of another model; None: there are none."""
        ...


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A published checkpoint, with its configuration read and its weights not yet."""

    path: Path
    config: Config
    processor: Processor | EncoderProcessor
    tables: tuple[Table, ...]  # the names that are written, then others that the same tensors are read under
    open_source: Callable[[], Source]  # reads the headers of the weights
    keep_files: Callable[[Path], None]  # writes everything but the weights into a folder
    exported_name: Callable[[str], str | None] | None = lambda name: name  # None: the tensor stays out
    exported_settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # of config.json, in an export

    def load(
        self, mesh: Mesh, dtype: str | None = None, *, progress: Callable[[int, int], None] = lambda done, total: None
    ) -> tuple[nn.Module, Any]:
        """The model, and its parameters on the mesh.

        Args:
          dtype: "float32" or "bfloat16"; None: bfloat16 on GPU and TPU.
        """
        compute = compute_dtype(dtype or "auto")
        return module_of(self.config)(self.config, compute), self.load_params(mesh, dtype=compute, progress=progress)

    def convert(self, folder: str | Path, mesh: Mesh) -> int:
        """`export` of the parameters as they were published."""
        return self.export(self.load_params(mesh), folder)

    def load_params(
        self, mesh: Mesh, *, dtype: Any = None, progress: Callable[[int, int], None] = lambda done, total: None
    ) -> Any:
        """Its parameters, each on the devices that `sharding.RULES` give it; see `engine.load_params`.

        Raises:
          ChecksumError: the weights are not those that `api.export` wrote.
        """
        check_folder(self.path, weights=True)
        source = self.open_source()
        table = max(self.tables, key=lambda table: names_known(table, source))
        return load_params(
            source, table, boxed_params(module_of(self.config)(self.config)), mesh, dtype=dtype, progress=progress
        )

    def adapter_tables(self, boxes: Mapping[str, Any]) -> tuple[Table, ...]:
        """The names that adapters of it may come under (`interop/peft.py`).

        Args:
          boxes: of the model's parameters, by path.
        """
        return (*self.tables, own_table(boxes))

    def export(self, params: Any, folder: str | Path) -> int:
        """Writes a folder that the family's own code loads: `params`, and this checkpoint's configuration and processing.

        Returns:
          the bytes of the weights.

        Raises:
          PublishedError: the folder holds something already, or this kind of checkpoint has no folder.
          ConversionError: the parameters are not of this model.
        """
        if self.exported_name is None:
            raise PublishedError(
                f"{self.path} is one file, without a published configuration: export the folder it was made of"
            )
        target = new_folder(folder)
        named = ((self.exported_name(name), tensor) for name, tensor in published_tensors(params, self.tables[0]))
        written = safetensors_files.write(target, ((name, tensor) for name, tensor in named if name is not None))
        self.keep_files(target)
        path = target / "config.json"
        settings = read_settings(path)
        held = {"dtype": str(jax.tree.leaves(params)[0].dtype)} if "dtype" in settings else {}
        if (changed := settings | held | dict(self.exported_settings)) != settings:
            path.write_text(json.dumps(changed, indent=2) + "\n")
        return written
