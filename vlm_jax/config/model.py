"""A whole model."""

from __future__ import annotations

from vlm_jax.config.connector import MlpProjectorConfig, PerceiverConfig
from vlm_jax.config.frozen import frozen
from vlm_jax.config.fusion import GatedCrossAttentionConfig, InSequenceConfig
from vlm_jax.config.language import DecoderConfig
from vlm_jax.config.vision import VitConfig


@frozen
class ModelConfig:
    """Four choices: vision encoder -> connector -> fusion -> language model."""

    vision: VitConfig | None  # None: a language model alone
    connector: PerceiverConfig | MlpProjectorConfig | None
    fusion: GatedCrossAttentionConfig | InSequenceConfig | None
    language: DecoderConfig
