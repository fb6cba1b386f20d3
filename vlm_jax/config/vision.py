"""Vision encoders."""

from __future__ import annotations

from typing import Literal

from vlm_jax.config.block import BlockConfig
from vlm_jax.config.frozen import frozen


@frozen
class ClipVitConfig:
    """CLIP's vision transformer (Radford et al. 2021)."""

    kind: Literal["clip_vit"] = "clip_vit"
    image_size: int  # pixels of a side the positions are learned for
    patch_size: int
    layers: int
    block: BlockConfig
    feature_layer: int = -1  # which hidden state leaves: -1 the last, -2 the one before (LLaVA), 0 the embeddings
    post_norm: bool = True  # `post_layernorm` on the features; OpenFlamingo and LLaVA take them before it
    holds_post_norm: bool = False  # without `post_norm`: a published checkpoint's, which no feature is made of
    position_init: float | None = None  # deviation the positions start with; None: width ** -0.5, as CLIP's
    class_token: bool = False  # whether the class token is among the features
    mean: tuple[float, ...] = (0.48145466, 0.4578275, 0.40821073)  # of the pixels in 0..1
    std: tuple[float, ...] = (0.26862954, 0.26130258, 0.27577711)
