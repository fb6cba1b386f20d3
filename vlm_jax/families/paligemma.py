"""PaliGemma (Beyer et al. 2024): `PaliGemmaForConditionalGeneration`."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Set as AbstractSet
from typing import Any

from vlm_jax.config import InSequenceConfig, MlpProjectorConfig, ModelConfig
from vlm_jax.config.generation import Settings
from vlm_jax.families.llava import towers
from vlm_jax.interop.hf_config import require
from vlm_jax.interop.published import Family
from vlm_jax.interop.register import FAMILIES, LANGUAGE, VISION
from vlm_jax.interop.table import Table, row
from vlm_jax.processing.conversation import Conversation, Text, media_of
from vlm_jax.processing.media import PublishedMedia
from vlm_jax.processing.published import PublishedProcessor

PROJECTOR = "[multi_modal_projector|model.multi_modal_projector].linear"


def config_from_hf(config: Any) -> ModelConfig:
    """`PaliGemmaConfig` -> ours."""
    require(config.vision_config, model_type="siglip_vision_model")
    text = copy.copy(config.text_config)
    text.use_bidirectional_attention = None  # of the prefix, which the fusion tells
    language = LANGUAGE[text.model_type].config_from_hf(text)
    return ModelConfig(
        vision=VISION[config.vision_config.model_type].config_from_hf(config.vision_config),
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
    """All pictures come first, then the begin token, the prompt and a line break."""

    before_answer = "\n"

    def __init__(self, hf_processor: Any, ends: AbstractSet[int], defaults: Settings, side: int, count: int) -> None:
        media = PublishedMedia(hf_processor.image_processor, side, count)
        super().__init__(hf_processor, ends, defaults, media=media, image_token=hf_processor.image_token)

    def render_without_template(self, turns: Conversation) -> str:
        said = tuple(dataclasses.replace(turn, content=(Text(turn.text),)) for turn in turns)
        return self.image_token * len(media_of(turns)) + super().render_without_template(said)

    def postprocess_prompt(self, text: str) -> str:
        pictures, token, prompt = text.rpartition(self.image_token)
        return f"{pictures}{token}{self.tokenizer.begin}{prompt}\n"


def _processor(config: ModelConfig, hf_config: Any, *rest: Any) -> PaliGemmaProcessor:
    return PaliGemmaProcessor(*rest, config.vision.image_size, config.vision.frame_features)


FAMILIES.add("paligemma")(Family(config_from_hf, table, _processor))
