"""A whole model."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, Literal

from vlm_jax.config.connector import ConnectorConfig
from vlm_jax.config.frozen import Kinds, frozen
from vlm_jax.config.fusion import FusionConfig
from vlm_jax.config.language import LanguageConfig
from vlm_jax.config.vision import VisionConfig


@frozen
class SystemConfig(Kinds):
    """A model that a run trains.

    Attributes of every kind:
      answers: whether it generates text; has_vision: whether it reads images.
      vision: the vision encoder, None: there is none; language: what reads the tokens of a batch.
      visual_tokens_in_sequence, reads_shapes: see `ModelConfig`.
      vision_path: where the parameters of the vision encoder stand.
      cached_features: number and width of what `data.cache_features` keeps of an image; cached_by: what that depends on.
    """

    default_kind: ClassVar[str] = "vlm"


@frozen
class ModelConfig(SystemConfig):
    """Four choices: vision encoder -> connector -> fusion -> language model."""

    kind: Literal["vlm"] = "vlm"
    vision: VisionConfig | None  # None: a language model alone
    connector: ConnectorConfig | None
    fusion: FusionConfig | None
    language: LanguageConfig

    answers: ClassVar[bool] = True
    vision_path: ClassVar[str] = "vision"

    @property
    def cached_features(self) -> tuple[int, int]:
        """What the connector reads of an image."""
        return self.vision.frame_features, self.vision.width

    @property
    def cached_by(self) -> Any:
        """What cached features depend on, beside parameters."""
        return self.vision

    @property
    def has_vision(self) -> bool:
        return self.vision is not None

    @property
    def visual_width(self) -> int:
        """Width of the visual tokens."""
        return self.connector.visual_width(self.vision.width)

    @property
    def visual_tokens_in_sequence(self) -> int:
        """Number of visual tokens of a tile in the sequence; 0: no vision, or cross-attention."""
        return self.visual_tokens(1) if self.fusion is not None and self.fusion.in_sequence else 0

    @property
    def reads_shapes(self) -> bool:
        """Whether the pictures of a batch may differ in size."""
        return self.vision is not None and self.vision.reads_shapes

    def visual_tokens(self, frames: int) -> int:
        """Number of visual tokens of an image slot with `frames` images of `vision.image_size`."""
        return self.connector.visual_tokens(frames, self.vision.frame_features)

    def with_pixels(self, mean: tuple[float, ...], std: tuple[float, ...]) -> ModelConfig:
        """The same, with pixels normalised by this mean and standard deviation."""
        return dataclasses.replace(self, vision=dataclasses.replace(self.vision, mean=mean, std=std))

    def part(self, params: Any, name: str) -> Any:
        """The parameters that start part `name` of another model; None: there are none."""
        return params.get(name)

    def part_path(self, name: str) -> str:
        """Where the parameters of part `name` stand in this model."""
        return name
