"""Two towers, one for images and one for texts, whose embeddings meet in one space."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, Literal

from vlm_jax.config.frozen import frozen
from vlm_jax.config.language import DecoderConfig
from vlm_jax.config.vision import VitConfig


@frozen
class ImageTowerConfig:
    """Image -> features -> one vector; with pool "none" features alone."""

    kind: Literal["image_tower"] = "image_tower"
    encoder: VitConfig
    pool: Literal["class_token", "attention", "none"]  # attention: a learned query reads the features (Zhai et al. 2022)
    projection: int | None = None  # the width of a linear map of the vector; None: there is none

    answers: ClassVar[bool] = False
    has_vision: ClassVar[bool] = True

    def with_pixels(self, mean: tuple[float, ...], std: tuple[float, ...]) -> ImageTowerConfig:
        """See `ModelConfig.with_pixels`."""
        return dataclasses.replace(self, encoder=dataclasses.replace(self.encoder, mean=mean, std=std))

    def part(self, params: Any, name: str) -> Any:
        """See `ModelConfig.part`; the image encoder is `vision`."""
        return params["encoder"] if name == "vision" else None


@frozen
class TextTowerConfig:
    """Tokens -> hidden states -> one of them -> one vector."""

    encoder: DecoderConfig
    causal: bool  # False: a token sees those after it too, as in SigLIP's
    pool: Literal["end_token", "last"]  # the first end token; or the last place of the row, be it padding
    end_token: int | None = None  # None: the token with the greatest number, as in CLIP's first release
    projection: int  # the width of the vector
    projection_bias: bool


@frozen
class DualEncoderConfig:
    """CLIP (Radford et al. 2021), and SigLIP (Zhai et al. 2023), whose loss takes each pair by itself."""

    kind: Literal["dual_encoder"] = "dual_encoder"
    image: ImageTowerConfig
    text: TextTowerConfig
    loss: Literal["softmax", "sigmoid"]
    logit_scale: float  # what the learned logarithm of the scale starts with
    logit_bias: float | None = None  # likewise of the bias; None: there is none

    answers: ClassVar[bool] = False
    has_vision: ClassVar[bool] = True

    def with_pixels(self, mean: tuple[float, ...], std: tuple[float, ...]) -> DualEncoderConfig:
        """See `ModelConfig.with_pixels`."""
        return dataclasses.replace(self, image=self.image.with_pixels(mean, std))

    def part(self, params: Any, name: str) -> Any:
        """See `ModelConfig.part`; the image encoder is `vision`."""
        return self.image.part(params["image"], name)
