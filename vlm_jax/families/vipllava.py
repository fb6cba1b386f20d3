"""ViP-LLaVA (Cai et al. 2024): `VipLlavaForConditionalGeneration`, LLaVA with joined features of several layers."""

from __future__ import annotations

from typing import Any

from vlm_jax.config import ModelConfig, NormConfig
from vlm_jax.families import llava
from vlm_jax.interop.published import Family
from vlm_jax.interop.register import FAMILIES


def config_from_hf(config: Any) -> ModelConfig:
    """`VipLlavaConfig` -> ours. The class token is always dropped.

    Raises:
      ValueError: as `llava.build`.
    """
    norm = NormConfig(kind="layer", eps=config.projector_layernorm_eps)
    return llava.build(config, class_token="dropped", bias=True, norm=norm)


FAMILIES.add("vipllava")(Family(config_from_hf, llava.table, llava.processor, fit_pictures=llava.fit_pictures))
