"""Two towers, one for images and one for texts, whose embeddings meet in one space."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, Literal

from vlm_jax.config.frozen import frozen
from vlm_jax.config.language import DecoderConfig
from vlm_jax.config.model import SystemConfig
from vlm_jax.config.vision import VitConfig


@frozen
class ImageTowerConfig:
    """Image -> features -> one vector; with pool "none" features alone."""

    kind: Literal["image_tower"] = "image_tower"
    encoder: VitConfig
    # mean: of the patches' features; attention: a learned query reads the features (Zhai et al. 2022).
    pool: Literal["class_token", "mean", "attention", "none"]
    projection: int | None = None  # the width of a linear map of the vector; None: there is none

    answers: ClassVar[bool] = False
    has_vision: ClassVar[bool] = True

    @property
    def width(self) -> int:
        """Of the vector."""
        return self.projection or self.encoder.width

    def with_pixels(self, mean: tuple[float, ...], std: tuple[float, ...]) -> ImageTowerConfig:
        """See `ModelConfig.with_pixels`."""
        return dataclasses.replace(self, encoder=dataclasses.replace(self.encoder, mean=mean, std=std))

    def part(self, params: Any, name: str) -> Any:
        """See `ModelConfig.part`; the image encoder is `vision`."""
        return params["encoder"] if name == "vision" else None


@frozen
class TextTowerConfig:
    """Tokens -> hidden states -> one vector."""

    kind: Literal["text_tower"] = "text_tower"
    encoder: DecoderConfig
    causal: bool  # False: a token sees those after it too, as in SigLIP's
    # The first end token; the last place of the row, be it padding; the first, BERT's class token; or the mean of all.
    pool: Literal["end_token", "last", "first", "mean"]
    end_token: int | None = None  # None: the token with the greatest number, as in CLIP's first release
    pad_token: int | None = None  # which no token sees and no mean counts (BERT); None: padding is read like all else
    projection: int | None  # the width of a linear map of the vector; None: there is none
    projection_bias: bool

    answers: ClassVar[bool] = False
    has_vision: ClassVar[bool] = False

    @property
    def width(self) -> int:
        """Of the vector."""
        return self.projection or self.encoder.width

    def part(self, params: Any, name: str) -> Any:
        """See `ModelConfig.part`; the text encoder is `text`."""
        return params["encoder"] if name == "text" else None


@frozen
class DualEncoderConfig(SystemConfig):
    """CLIP (Radford et al. 2021), and SigLIP (Zhai et al. 2023), whose loss takes each pair by itself."""

    kind: Literal["dual_encoder"] = "dual_encoder"
    image: ImageTowerConfig
    text: TextTowerConfig
    loss: Literal["softmax", "sigmoid"]
    logit_scale: float  # what the learned logarithm of the scale starts with
    logit_bias: float | None = None  # likewise of the bias; None: there is none

    answers: ClassVar[bool] = False
    has_vision: ClassVar[bool] = True
    visual_tokens_in_sequence: ClassVar[int] = 0
    vision_path: ClassVar[str] = "image/encoder"
    paths: ClassVar[dict[str, str]] = {"vision": vision_path, "text": "text/encoder"}

    @property
    def vision(self) -> VitConfig:
        return self.image.encoder

    @property
    def language(self) -> DecoderConfig:
        return self.text.encoder

    @property
    def reads_shapes(self) -> bool:
        return self.vision.reads_shapes

    @property
    def cached_features(self) -> tuple[int, int]:
        """What is left of an image once nothing without parameters has still to be done: `ImageTower.cached_features`."""
        return (self.vision.frame_features if self.image.pool == "attention" else 1), self.vision.width

    @property
    def cached_by(self) -> Any:
        """See `ModelConfig.cached_by`."""
        return self.vision, self.image.pool

    def with_pixels(self, mean: tuple[float, ...], std: tuple[float, ...]) -> DualEncoderConfig:
        """See `ModelConfig.with_pixels`."""
        return dataclasses.replace(self, image=self.image.with_pixels(mean, std))

    def part(self, params: Any, name: str) -> Any:
        """See `ModelConfig.part`; the encoders are `vision` and `text`."""
        tower = {"vision": self.image, "text": self.text}.get(name)
        return None if tower is None else tower.part(params[self.paths[name].split("/")[0]], name)

    def part_path(self, name: str) -> str:
        """See `ModelConfig.part_path`."""
        return self.paths.get(name, name)
