"""Gemma (Gemma Team 2024), the language model of PaliGemma: `GemmaForCausalLM`. Its table is LLaMA's."""

from __future__ import annotations

import dataclasses
from typing import Any

from vlm_jax.config import DecoderConfig
from vlm_jax.families import llama
from vlm_jax.families.llama import table
from vlm_jax.interop.hf_config import require
from vlm_jax.interop.published import register_language
from vlm_jax.interop.register import LanguageFamily

__all__ = ["config_from_hf", "table"]


def config_from_hf(config: Any) -> DecoderConfig:
    """`GemmaConfig` -> ours."""
    if config.use_bidirectional_attention:
        require(config, use_bidirectional_attention=None)
    ours = llama.config_from_hf(config)
    norm = dataclasses.replace(ours.block.norm, plus_one=True)
    return dataclasses.replace(ours, block=dataclasses.replace(ours.block, norm=norm), scale_embedding=True)


register_language("gemma", part=LanguageFamily(config_from_hf, table))
