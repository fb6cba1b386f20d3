"""LLaVA-1.5 and BakLLaVA (Liu et al. 2023): `LlavaForConditionalGeneration`. LLaVA-NeXT has the same parameters and a newline,
ViP-LLaVA a norm.

The files of the hub, those that transformers 5 saves, its names in memory, those of 4.52 to 4.57, and the authors' own
(`liuhaotian/llava-v1.5-7b`) spell the same parameters in five ways; all are read, the hub's is written.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from PIL import Image

from vlm_jax.config import InSequenceConfig, MlpProjectorConfig, ModelConfig, NormConfig
from vlm_jax.interop.hf_config import activation
from vlm_jax.interop.published import Family
from vlm_jax.interop.register import FAMILIES, LANGUAGE, VISION
from vlm_jax.interop.rows import norm
from vlm_jax.interop.table import Table, row
from vlm_jax.processing.media import PublishedMedia, picture_bytes
from vlm_jax.processing.published import PublishedProcessor

# The authors' ViP-LLaVA has names of its own.
PROJECTOR = (
    "[multi_modal_projector.linear_{0}|model.multi_modal_projector.linear_{0}|model.mm_projector.{1}|"
    "model.mm_projector.final_linear.{1}]"
)
NORM = (
    "[multi_modal_projector.projector_layernorm|model.multi_modal_projector.projector_layernorm|"
    "model.mm_projector.clip_layernorm]"
)


def config_from_hf(config: Any) -> ModelConfig:
    """`LlavaConfig` or `LlavaNextConfig` -> ours; features as `build` says.

    Raises:
      ValueError: as `build`.
    """
    return build(
        config,
        class_token="dropped" if config.vision_feature_select_strategy == "default" else "kept",
        bias=config.multimodal_projector_bias,
    )


def build(config: Any, *, class_token: str, bias: bool, norm: NormConfig | None = None) -> ModelConfig:
    """A LLaVA of any kind -> ours.

    Features are those of `vision_feature_layer`, or of a list of layers, joined.

    Args:
      class_token: "dropped" or "kept"; of the projector: bias, norm.

    Raises:
      ValueError: an encoder without a class token that is to be dropped, or a language model whose embeddings are
        narrower than its layers.
    """
    vision = VISION[config.vision_config.model_type].config_from_hf(config.vision_config)
    language = LANGUAGE[config.text_config.model_type].config_from_hf(config.text_config)
    layers = config.vision_feature_layer
    if vision.class_token == "none" and class_token == "dropped":
        raise ValueError(
            "the first feature is dropped (vision_feature_select_strategy='default'; ViP-LLaVA always drops it), and the "
            f"{config.vision_config.model_type!r} here has no class token: only 'full' is implemented for it"
        )
    if language.embedding_width is not None:
        raise ValueError(
            f"text_config: embeddings of width {language.embedding_width} in a model of width {language.width}, and visual "
            "tokens stand among them: only one width is implemented"
        )
    return ModelConfig(
        vision=dataclasses.replace(
            vision,
            feature_layer=layers if isinstance(layers, int) else tuple(layers),
            post_norm="held",
            class_token="none" if vision.class_token == "none" else class_token,
        ),
        connector=MlpProjectorConfig(
            width=language.block.width, activation=activation(config.projector_hidden_act), bias=bias, norm=norm
        ),
        fusion=InSequenceConfig(newline=config.model_type == "llava_next"),
        language=dataclasses.replace(language, tied_head=config.tie_word_embeddings),
    )


def fit_pictures(config: ModelConfig, hf_config: Any, pictures: Any) -> ModelConfig:
    """With the size of the pictures that transformers' processor makes, where the vision encoder takes any.

    DINOv2 is published with positions for 518 pixels and a processor that gives 224.
    """
    if not VISION[hf_config.vision_config.model_type].any_size:
        return config
    height, width, _ = picture_bytes(pictures, Image.new("RGB", (64, 64)))[0].shape
    if height != width or height == config.vision.image_size:
        return config
    vision = dataclasses.replace(config.vision, image_size=height, learned_size=config.vision.image_size)
    return dataclasses.replace(config, vision=vision)


def table(config: ModelConfig, hf_config: Any) -> Table:
    """Published names <-> the paths of a `VisionLanguageModel`."""
    rows = []
    for ours, numbers in (("linear_0", (1, 0)), ("linear_1", (2, 2))):
        name = PROJECTOR.replace("{0}", str(numbers[0])).replace("{1}", str(numbers[1]))
        rows.append(row(f"{name}.weight", f"connector/{ours}/kernel", "W D -> D W"))
        if config.connector.bias:
            rows.append(row(f"{name}.bias", f"connector/{ours}/bias", "W -> W"))
    if config.connector.norm is not None:
        rows += norm(NORM, "connector/norm")
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
    inside = ("vision_tower.{}", "vision_tower.", "model.vision_tower.{}", "model.vision_tower.")
    known = dict.fromkeys(name.format(tower.prefix) for name in (*inside, "model.vision_tower.vision_tower.{}"))
    return tower.table(config.vision).under(f"[{'|'.join(known)}]", "vision/") + text


def processor(config: ModelConfig, hf_config: Any, hf_processor: Any, *rest: Any) -> PublishedProcessor:
    """Every picture is one tile, all of whose patches are visual tokens."""
    media = PublishedMedia(hf_processor.image_processor, config.vision.image_size, config.vision.frame_features)
    return PublishedProcessor(hf_processor, *rest, media=media, image_token=hf_processor.image_token)


FAMILIES.add("llava")(Family(config_from_hf, table, processor, fit_pictures=fit_pictures, pads_to_square=True))
