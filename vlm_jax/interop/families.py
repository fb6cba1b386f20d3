"""Every kind of published checkpoint that can be read, by transformers' `model_type`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

from vlm_jax.config import ModelConfig
from vlm_jax.generation.request import Settings
from vlm_jax.interop import idefics, llava, paligemma
from vlm_jax.interop.anyres import anyres_places
from vlm_jax.interop.idefics_processor import IdeficsProcessor
from vlm_jax.interop.parts import LANGUAGE, LanguageModel
from vlm_jax.interop.processor import Pictures, PublishedProcessor, Wrapped
from vlm_jax.interop.table import Table


@dataclasses.dataclass(frozen=True)
class Family:
    config_from_hf: Callable[[Any], ModelConfig]
    table: Callable[[ModelConfig, Any], Table]
    # From our configuration and transformers'; the rest as `PublishedProcessor` takes it.
    processor: Callable[[ModelConfig, Any, Wrapped, set[int], Settings], PublishedProcessor]


def _alone(part: LanguageModel) -> Family:
    return Family(
        lambda hf: ModelConfig(vision=None, connector=None, fusion=None, language=part.config_from_hf(hf)),
        lambda config, hf: part.table(config.language).under(ours="language/"),
        lambda config, hf, *rest: PublishedProcessor(*rest),
    )


def _every_patch(config: ModelConfig, hf: Any, wrapped: Wrapped, *rest: Any) -> PublishedProcessor:
    places = np.arange(config.vision.frame_features)
    return PublishedProcessor(wrapped, *rest, Pictures(wrapped.image_token, lambda size: places))


def _anyres(config: ModelConfig, hf: Any, wrapped: Wrapped, *rest: Any) -> PublishedProcessor:
    vision, pinpoints = config.vision, [tuple(point) for point in hf.image_grid_pinpoints]
    places = lambda size: anyres_places(size, pinpoints, vision.image_size, vision.patch_size)
    return PublishedProcessor(wrapped, *rest, Pictures(wrapped.image_token, places))


FAMILIES = {name: _alone(part) for name, part in LANGUAGE.items()} | {
    "idefics": Family(idefics.config_from_hf, idefics.table, lambda config, hf, *rest: IdeficsProcessor(*rest)),
    "llava": Family(llava.config_from_hf, llava.table, _every_patch),
    "paligemma": Family(
        paligemma.config_from_hf,
        paligemma.table,
        lambda config, hf, *rest: paligemma.PaliGemmaProcessor(*rest, config.vision.frame_features),
    ),
    "llava_next": Family(llava.config_from_hf, llava.table, _anyres),
}
