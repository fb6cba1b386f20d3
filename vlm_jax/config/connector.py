"""Connectors: from the features of a picture to visual tokens."""

from __future__ import annotations

from typing import Literal

from vlm_jax.config.block import Activation
from vlm_jax.config.frozen import frozen


@frozen
class PerceiverConfig:
    """Flamingo's Perceiver resampler (Alayrac et al. 2022, section 3.1)."""

    kind: Literal["perceiver_resampler"] = "perceiver_resampler"
    latents: int
    layers: int
    heads: int
    head_width: int
    mlp_ratio: int = 4
    activation: Activation = "squared_relu"  # OpenFlamingo: gelu; IDEFICS: relu
    norm_eps: float = 1e-5
    qk_norm: bool = False  # IDEFICS
    time_embeddings: int = 0  # frames with a learned time embedding; 0: none (OpenFlamingo, IDEFICS)


@frozen
class MlpProjectorConfig:
    """Linear maps with an activation between them: LLaVA (Liu et al. 2023) has one, LLaVA-1.5 two, PaliGemma one."""

    kind: Literal["mlp"] = "mlp"
    width: int  # of the visual tokens: the language model's
    layers: int = 2
    activation: Activation = "gelu"
    bias: bool = True
