"""Registers of the published families, by transformers' `model_type`. Each file in `families/` registers its own."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from vlm_jax.config import DecoderConfig, VitConfig
from vlm_jax.config.register import Register
from vlm_jax.interop.checkpoint import Checkpoint
from vlm_jax.interop.table import Table
from vlm_jax.processing.processor import Processor

PACKAGE = "vlm_jax.families"


class CheckpointFamily(Protocol):
    """Opens the folders of a `model_type`; `interop.published.Family` is the one for folders saved by transformers.

    Attributes:
      pads_to_square: whether `pad_to_square` may be asked of it.
    """

    pads_to_square: bool

    def open(self, folder: Path, *, pickles: bool, pad_to_square: bool) -> Checkpoint:
        """
        Raises:
          PublishedError: the folder is damaged, or of a kind that cannot be read.
        """
        ...

    def open_processor(self, folder: Path) -> Processor:
        """The processing alone, of a folder that `Checkpoint.keep_files` wrote."""
        ...


@dataclasses.dataclass(frozen=True)
class LanguageFamily:
    """A language model that can stand in a larger model."""

    config_from_hf: Callable[[Any], DecoderConfig]
    table: Callable[[DecoderConfig], Table]
    prefix: str = "model."  # of all published names but the head's
    head: str = "lm_head."


@dataclasses.dataclass(frozen=True)
class VisionFamily:
    """A vision encoder that can stand in a larger model."""

    config_from_hf: Callable[[Any], VitConfig]
    table: Callable[[VitConfig], Table]  # without a prefix
    prefix: str = "vision_model."  # of its names in hub files of a larger model
    any_size: bool = False  # whether pictures may have another size than its positions were learned for


FAMILIES: Register[CheckpointFamily] = Register("a published checkpoint of model_type", PACKAGE)
LANGUAGE: Register[LanguageFamily] = Register("a language model of model_type", PACKAGE)
VISION: Register[VisionFamily] = Register("a vision encoder of model_type", PACKAGE)
FILES: Register[Callable[[Path], Checkpoint]] = Register("a checkpoint in one file of the kind", PACKAGE)
