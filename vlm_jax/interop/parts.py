"""The published parts that systems are put together from, by transformers' `model_type`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from vlm_jax.config import DecoderConfig, VitConfig
from vlm_jax.interop import gemma, gpt_neox, llama, mixtral, mpt, opt, qwen2, vit
from vlm_jax.interop.source import PublishedError
from vlm_jax.interop.table import Table


@dataclasses.dataclass(frozen=True)
class LanguageModel:
    config_from_hf: Callable[[Any], DecoderConfig]
    table: Callable[[DecoderConfig], Table]
    prefix: str  # of all published names but the head's
    head: str = "lm_head."


LANGUAGE = {
    "llama": LanguageModel(llama.config_from_hf, llama.table, "model."),
    "mistral": LanguageModel(llama.config_from_hf, llama.table, "model."),
    "mixtral": LanguageModel(mixtral.config_from_hf, mixtral.table, "model."),
    "qwen2": LanguageModel(qwen2.config_from_hf, qwen2.table, "model."),
    "gpt_neox": LanguageModel(gpt_neox.config_from_hf, gpt_neox.table, "gpt_neox.", "embed_out."),
    "gemma": LanguageModel(gemma.config_from_hf, gemma.table, "model."),
    "opt": LanguageModel(opt.config_from_hf, opt.table, "model."),
    "mpt": LanguageModel(mpt.config_from_hf, mpt.table, "transformer."),
}


@dataclasses.dataclass(frozen=True)
class VisionEncoder:
    config_from_hf: Callable[[Any], VitConfig]
    rows: Callable[[VitConfig], Table]  # without a prefix


VISION = {
    "clip_vision_model": VisionEncoder(vit.config_from_hf, vit.rows),
    "siglip_vision_model": VisionEncoder(vit.config_from_hf, vit.rows),
}


def language_model(config: Any) -> LanguageModel:
    """
    Raises:
      PublishedError: a kind of language model that is not known.
    """
    return _part("language model", LANGUAGE, config)


def vision_encoder(config: Any) -> VisionEncoder:
    """
    Raises:
      PublishedError: a kind of vision encoder that is not known.
    """
    return _part("vision encoder", VISION, config)


def _part(name: str, known: dict[str, Any], config: Any) -> Any:
    if config.model_type not in known:
        raise PublishedError(f"{name} of model_type {config.model_type!r}: expected one of {', '.join(sorted(known))}")
    return known[config.model_type]
