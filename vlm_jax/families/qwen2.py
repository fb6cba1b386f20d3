"""Qwen2 and Qwen2.5 (Yang et al. 2024): `Qwen2ForCausalLM`. Its table is LLaMA's."""

from __future__ import annotations

import dataclasses
from typing import Any

from vlm_jax.config import DecoderConfig
from vlm_jax.families import llama
from vlm_jax.families.llama import table
from vlm_jax.interop.published import register_language
from vlm_jax.interop.register import LanguageFamily

__all__ = ["config_from_hf", "table"]

WINDOWED, FULL = "sliding_attention", "full_attention"


def config_from_hf(config: Any) -> DecoderConfig:
    """`Qwen2Config` -> ours. Queries, keys and values always have biases, and nothing else has."""
    ours = llama.config_from_hf(config)
    block = dataclasses.replace(ours.block, qkv_bias=True, out_bias=False, mlp_bias=False)
    return dataclasses.replace(ours, block=block, window=_window(config))


def _window(config: Any) -> int | tuple[int | None, ...] | None:
    """
    Raises:
      ValueError: a type of layer that this library does not have.
    """
    if unknown := set(config.layer_types) - {WINDOWED, FULL}:
        raise ValueError(f"{type(config).__name__}: layer_types {sorted(unknown)}; expected {WINDOWED} or {FULL}")
    windows = tuple(config.sliding_window if kind == WINDOWED else None for kind in config.layer_types)
    return windows[0] if len(set(windows)) == 1 else windows


register_language("qwen2", part=LanguageFamily(config_from_hf, table))
