"""LLaVA-1.5 and BakLLaVA (Liu et al. 2023): `LlavaForConditionalGeneration`. LLaVA-NeXT has the same parameters and a newline.

The files of the hub, those that transformers 5 saves, its names in memory, those of 4.52 to 4.57, and the authors' own
(`liuhaotian/llava-v1.5-7b`) spell the same parameters in five ways; all are read, the hub's is written.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from vlm_jax.config import InSequenceConfig, MlpProjectorConfig, ModelConfig, VitConfig
from vlm_jax.interop.hf_config import activation
from vlm_jax.interop.published import Family
from vlm_jax.interop.register import FAMILIES, LANGUAGE, VISION
from vlm_jax.interop.table import Table, row
from vlm_jax.processing.media import PublishedMedia
from vlm_jax.processing.published import PublishedProcessor

TOWER = (
    "[vision_tower.vision_model.|vision_tower.|model.vision_tower.vision_model.|model.vision_tower.|"
    "model.vision_tower.vision_tower.vision_model.]"
)
PROJECTOR = "[multi_modal_projector.linear_{0}|model.multi_modal_projector.linear_{0}|model.mm_projector.{1}]"


def config_from_hf(config: Any) -> ModelConfig:
    """`LlavaConfig` or `LlavaNextConfig` -> ours.

    Raises:
      ValueError: features of several layers, as VipLLaVA's.
    """
    if not isinstance(config.vision_feature_layer, int):
        raise ValueError(f"vision_feature_layer={config.vision_feature_layer}: only one layer (a number) is implemented")
    vision = VISION[config.vision_config.model_type].config_from_hf(config.vision_config)
    language = LANGUAGE[config.text_config.model_type].config_from_hf(config.text_config)
    return ModelConfig(
        vision=dataclasses.replace(
            vision,
            feature_layer=config.vision_feature_layer,
            post_norm="held",
            class_token=_class_token(vision, config),
        ),
        connector=MlpProjectorConfig(
            width=language.block.width,
            activation=activation(config.projector_hidden_act),
            bias=config.multimodal_projector_bias,
        ),
        fusion=InSequenceConfig(newline=config.model_type == "llava_next"),
        language=dataclasses.replace(language, tied_head=config.tie_word_embeddings),
    )


def _class_token(vision: VitConfig, config: Any) -> str:
    if vision.class_token == "none":
        if config.vision_feature_select_strategy == "default":
            raise ValueError(
                "vision_feature_select_strategy='default' drops the first feature, and this vision encoder has no class token: "
                "only 'full' is implemented"
            )
        return "none"
    return "kept" if config.vision_feature_select_strategy == "full" else "dropped"


def table(config: ModelConfig, hf_config: Any) -> Table:
    """Published names <-> the paths of a `VisionLanguageModel`."""
    rows = []
    for ours, numbers in (("linear_0", (1, 0)), ("linear_1", (2, 2))):
        name = PROJECTOR.replace("{0}", str(numbers[0])).replace("{1}", str(numbers[1]))
        rows.append(row(f"{name}.weight", f"connector/{ours}/kernel", "W D -> D W"))
        if config.connector.bias:
            rows.append(row(f"{name}.bias", f"connector/{ours}/bias", "W -> W"))
    if config.fusion.newline:
        rows.append(row("[image_newline|model.image_newline]", "fusion/newline", "D -> D"))
    return towers(config, hf_config) + Table(tuple(rows))


def towers(config: ModelConfig, hf_config: Any) -> Table:
    """The vision encoder and the language model in all spellings."""
    tower = VISION[hf_config.vision_config.model_type]
    language = LANGUAGE[hf_config.text_config.model_type]
    prefix = language.prefix
    # In memory the base model's own prefix gives way to `model.language_model.`; the authors' LLaVA *is* a LLaMA.
    spellings = {
        prefix: f"[language_model.{prefix}|model.language_model.|{prefix}]",
        language.head: f"[language_model.{language.head}|{language.head}]",
    }
    text = language.table(config.language).renamed(spellings, "language/")
    return tower.table(config.vision).under(TOWER, "vision/") + text


def processor(config: ModelConfig, hf_config: Any, hf_processor: Any, *rest: Any) -> PublishedProcessor:
    """Every picture is one tile, all of whose patches are visual tokens."""
    media = PublishedMedia(hf_processor.image_processor, config.vision.image_size, config.vision.frame_features)
    return PublishedProcessor(hf_processor, *rest, media=media, image_token=hf_processor.image_token)


FAMILIES.add("llava")(Family(config_from_hf, table, processor, pads_to_square=True))
