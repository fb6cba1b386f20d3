"""Connectors: from the features of a picture to visual tokens. Each knows how wide and how many those are."""

from __future__ import annotations

from typing import Literal

from vlm_jax.config.block import Activation, NormConfig
from vlm_jax.config.frozen import Kinds, frozen


@frozen
class ConnectorConfig(Kinds):
    """A connector: the features of a picture -> visual tokens."""

    def visual_width(self, features_width: int) -> int:
        """Width of the visual tokens."""
        raise NotImplementedError

    def visual_tokens(self, frames: int, features: int) -> int:
        """Number of visual tokens of a slot with `frames` images of `features` features each."""
        raise NotImplementedError


@frozen
class ProjectionConfig:
    """A gated feed-forward that takes features to another width: IDEFICS2's modality projection."""

    width: int
    mlp_width: int
    activation: Activation


@frozen
class PerceiverConfig(ConnectorConfig):
    """Flamingo's Perceiver resampler (Alayrac et al. 2022, section 3.1)."""

    kind: Literal["perceiver_resampler"] = "perceiver_resampler"
    latents: int
    layers: int
    heads: int
    head_width: int
    mlp_ratio: int = 4
    activation: Activation = "squared_relu"  # OpenFlamingo: gelu; IDEFICS: relu
    norm: NormConfig = NormConfig(kind="layer", eps=1e-5)
    qk_norm: bool = False  # IDEFICS
    # IDEFICS2: fewer key/value heads (None: as many), a gated feed-forward, a projection of the features before it, and latents
    # for every frame of its own, since its frames are the crops of a picture.
    kv_heads: int | None = None
    gated_mlp: bool = False
    projection: ProjectionConfig | None = None
    per_frame: bool = False
    time_embeddings: int = 0  # frames with a learned time embedding; 0: none (OpenFlamingo, IDEFICS)

    def visual_width(self, features_width: int) -> int:
        return features_width if self.projection is None else self.projection.width

    def visual_tokens(self, frames: int, features: int) -> int:
        return self.latents * (frames if self.per_frame else 1)


@frozen
class TransformerResamplerConfig(ConnectorConfig):
    """Latents and features in one transformer, of which the latents are kept: an ablation of Flamingo's (table 3, vi)."""

    kind: Literal["transformer_resampler"] = "transformer_resampler"
    latents: int
    layers: int
    heads: int
    head_width: int
    mlp_ratio: int = 4
    activation: Activation = "squared_relu"
    norm: NormConfig = NormConfig(kind="layer", eps=1e-5)
    time_embeddings: int = 0  # as of `PerceiverConfig`

    def visual_width(self, features_width: int) -> int:
        return features_width

    def visual_tokens(self, frames: int, features: int) -> int:
        return self.latents


@frozen
class ResidualMlpConfig(ConnectorConfig):
    """Feed-forwards of each feature by itself, each added to it: an ablation of Flamingo's (table 3, vi)."""

    kind: Literal["residual_mlp"] = "residual_mlp"
    layers: int
    mlp_ratio: int = 4
    activation: Activation = "squared_relu"
    norm: NormConfig = NormConfig(kind="layer", eps=1e-5)
    time_embeddings: int = 0  # as of `PerceiverConfig`

    def visual_width(self, features_width: int) -> int:
        return features_width

    def visual_tokens(self, frames: int, features: int) -> int:
        return frames * features


@frozen
class MlpProjectorConfig(ConnectorConfig):
    """Linear maps with an activation between them: LLaVA (Liu et al. 2023) has one, LLaVA-1.5 two, PaliGemma one.

    ViP-LLaVA (Cai et al. 2024) has two, and a norm of the features in front of them.
    """

    kind: Literal["mlp"] = "mlp"
    width: int  # of the visual tokens: the language model's
    layers: int = 2
    activation: Activation = "gelu"
    bias: bool = True
    norm: NormConfig | None = None  # of the features

    def visual_width(self, features_width: int) -> int:
        return self.width

    def visual_tokens(self, frames: int, features: int) -> int:
        return frames * features


@frozen
class PixelShuffleConfig(ConnectorConfig):
    """Squares of `factor` x `factor` features become one visual token by a linear map (Idefics3, Laurencon et al. 2024).

    InternVL (Chen et al. 2024) has a norm in front of it.
    """

    kind: Literal["pixel_shuffle"] = "pixel_shuffle"
    width: int  # of the visual tokens: the language model's
    factor: int
    norm: NormConfig | None = None  # of the features
    # The standard deviation of untrained visual tokens, of normed features; that of the language model's embeddings lets its
    # first layers change both alike.
    initial_std: float = 1.0

    def visual_width(self, features_width: int) -> int:
        return self.width

    def visual_tokens(self, frames: int, features: int) -> int:
        return frames * features // self.factor**2
