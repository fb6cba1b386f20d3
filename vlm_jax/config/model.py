"""A whole model."""

from __future__ import annotations

from vlm_jax.config.connector import PerceiverConfig
from vlm_jax.config.frozen import frozen
from vlm_jax.config.fusion import GatedCrossAttentionConfig
from vlm_jax.config.language import DecoderConfig
from vlm_jax.config.vision import ClipVitConfig


@frozen
class ModelConfig:
    """Four choices: vision encoder -> connector -> fusion -> language model."""

    vision: ClipVitConfig | None  # None: a language model alone
    connector: PerceiverConfig | None
    fusion: GatedCrossAttentionConfig | None
    language: DecoderConfig
