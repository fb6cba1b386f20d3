"""A GGUF file as a checkpoint that answers; what `interop.published.Published` is for folders."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from vlm_jax.config import ModelConfig
from vlm_jax.config.generation import Settings
from vlm_jax.interop.engine import boxed_params, load_params
from vlm_jax.interop.gguf import read_gguf
from vlm_jax.interop.source import PublishedError
from vlm_jax.models.vlm import VisionLanguageModel
from vlm_jax.processing.published import PublishedProcessor


class GgufCheckpoint:
    def __init__(self, path: Path) -> None:
        """
        Raises:
          PublishedError: no such file, or not one that can be read.
        """
        self.path, self.file = path, read_gguf(path)
        self.config = ModelConfig(vision=None, connector=None, fusion=None, language=self.file.config)
        end = self.file.tokenizer.eos_token_id
        self.processor = PublishedProcessor(self.file.tokenizer, {end} - {None}, Settings())

    def load_params(self, mesh: Mesh, dtype: Any = None, tell: Callable[[int, int], None] = lambda done, total: None) -> Any:
        """Its parameters on the mesh, dequantised; see `engine.load_params`."""
        boxed = boxed_params(VisionLanguageModel(self.config))
        return load_params(self.file.source, self.file.table.under(ours="language/"), boxed, mesh, dtype, tell)

    def export(self, params: Any, folder: str | Path) -> int:
        """
        Raises:
          PublishedError: always; a GGUF file has no configuration of transformers to export under.
        """
        raise PublishedError(f"{self.path} is a GGUF file: it cannot be exported. Start from the folder it was made of")

    def keep_files(self, folder: Path) -> None:
        """Keeps the tokenizer."""
        self.file.tokenizer.save_pretrained(folder)
