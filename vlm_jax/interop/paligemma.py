"""PaliGemma (Beyer et al. 2024): `PaliGemmaForConditionalGeneration`."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence as Many
from typing import Any

import numpy as np

from vlm_jax.config import InSequenceConfig, MlpProjectorConfig, ModelConfig
from vlm_jax.generation.request import Picture, Request, Settings
from vlm_jax.interop.llava import towers
from vlm_jax.interop.parts import language_model, vision_encoder
from vlm_jax.interop.processor import Pictures, PublishedProcessor, Wrapped
from vlm_jax.interop.table import Table, row

PROJECTOR = "[multi_modal_projector|model.multi_modal_projector].linear"


def config_from_hf(config: Any) -> ModelConfig:
    """`PaliGemmaConfig` -> ours."""
    text = copy.copy(config.text_config)
    text.use_bidirectional_attention = None  # of the prefix, which the fusion tells
    language = language_model(text).config_from_hf(text)
    return ModelConfig(
        vision=vision_encoder(config.vision_config).config_from_hf(config.vision_config),
        connector=MlpProjectorConfig(width=language.block.width, layers=1),
        fusion=InSequenceConfig(prefix_lm=True),
        language=dataclasses.replace(language, tied_head=config.tie_word_embeddings),
    )


def table(config: ModelConfig, hf_config: Any) -> Table:
    """Published names <-> the paths of a `VisionLanguageModel`."""
    rows = (
        row(f"{PROJECTOR}.weight", "connector/linear_0/kernel", "W D -> D W"),
        row(f"{PROJECTOR}.bias", "connector/linear_0/bias", "W -> W"),
    )
    return towers(config, hf_config) + Table(rows)


class PaliGemmaProcessor(PublishedProcessor):
    """Pictures come first, then the begin token, the prompt and a line break."""

    def __init__(self, wrapped: Wrapped, ends: set[int], defaults: Settings, count: int) -> None:
        super().__init__(wrapped, ends, defaults, Pictures(wrapped.image_token, lambda size: np.arange(count)))

    def request(self, text: str, images: Many[Picture] = (), seed: int | None = None) -> Request:
        pictures, token, prompt = text.rpartition(self.pictures.token)
        return super().request(f"{pictures}{token}{self.tokenizer.wrapped.bos_token}{prompt}\n", images, seed)
