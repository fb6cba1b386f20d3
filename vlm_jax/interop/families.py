"""Every kind of published checkpoint that can be read, by transformers' `model_type`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

from vlm_jax.config import ModelConfig
from vlm_jax.interop import llava
from vlm_jax.interop.anyres import anyres_places
from vlm_jax.interop.parts import LANGUAGE, LanguageModel
from vlm_jax.interop.processor import Pictures
from vlm_jax.interop.table import Table


@dataclasses.dataclass(frozen=True)
class Family:
    config_from_hf: Callable[[Any], ModelConfig]
    table: Callable[[ModelConfig, Any], Table]
    pictures: Callable[[ModelConfig, Any, Any], Pictures | None]  # of ours, transformers' config and its processor


def _alone(part: LanguageModel) -> Family:
    return Family(
        lambda hf: ModelConfig(vision=None, connector=None, fusion=None, language=part.config_from_hf(hf)),
        lambda config, hf: part.table(config.language).under(ours="language/"),
        lambda config, hf, processor: None,
    )


def _every_patch(config: ModelConfig, hf: Any, processor: Any) -> Pictures:
    vision = config.vision
    count = (vision.image_size // vision.patch_size) ** 2 + int(vision.class_token)
    return Pictures(processor.image_token, lambda size: np.arange(count))


def _anyres(config: ModelConfig, hf: Any, processor: Any) -> Pictures:
    vision, pinpoints = config.vision, [tuple(point) for point in hf.image_grid_pinpoints]
    return Pictures(processor.image_token, lambda size: anyres_places(size, pinpoints, vision.image_size, vision.patch_size))


FAMILIES = {name: _alone(part) for name, part in LANGUAGE.items()} | {
    "llava": Family(llava.config_from_hf, llava.table, _every_patch),
    "llava_next": Family(llava.config_from_hf, llava.table, _anyres),
}
