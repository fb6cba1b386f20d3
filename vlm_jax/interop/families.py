"""Every kind of published checkpoint that can be read, by transformers' `model_type`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from vlm_jax.config import DualEncoderConfig, ImageTowerConfig, ModelConfig, VitConfig
from vlm_jax.interop import clip, dinov2, eva_clip, idefics, idefics2, llava, open_clip, paligemma, siglip
from vlm_jax.interop.anyres import AnyresMedia
from vlm_jax.interop.encoder_processor import EncoderProcessor
from vlm_jax.interop.idefics_processor import IdeficsProcessor
from vlm_jax.interop.parts import LANGUAGE, LanguageModel
from vlm_jax.interop.table import Table
from vlm_jax.processing.media import PublishedMedia
from vlm_jax.processing.published import PublishedProcessor

Config = ModelConfig | DualEncoderConfig | ImageTowerConfig


@dataclasses.dataclass(frozen=True)
class Family:
    config_from_hf: Callable[[Any], Config]
    table: Callable[[Config, Any], Table]  # from our configuration and transformers'
    # The same two and transformers' processor; of a model that answers, the rest as `PublishedProcessor` takes it.
    processor: Callable[..., PublishedProcessor | EncoderProcessor]
    other_tables: tuple[Callable[[Config], Table], ...] = ()  # of the same tensors under names that are read, not written


def _alone(part: LanguageModel) -> Family:
    return Family(
        lambda hf: ModelConfig(vision=None, connector=None, fusion=None, language=part.config_from_hf(hf)),
        lambda config, hf: part.table(config.language).under(ours="language/"),
        lambda config, hf, *rest: PublishedProcessor(*rest),
    )


def _every_patch(config: ModelConfig, hf: Any, wrapped: Any, *rest: Any) -> PublishedProcessor:
    media = PublishedMedia(wrapped.image_processor, config.vision.image_size, config.vision.frame_features)
    return PublishedProcessor(wrapped, *rest, media=media, image_token=wrapped.image_token)


def _anyres(config: ModelConfig, hf: Any, wrapped: Any, *rest: Any) -> PublishedProcessor:
    vision, pinpoints = config.vision, tuple((height, width) for height, width in hf.image_grid_pinpoints)
    sizes = (vision.image_size, vision.frame_features)
    media = AnyresMedia(wrapped.image_processor, *sizes, pinpoints=pinpoints, patch=vision.patch_size)
    return PublishedProcessor(wrapped, *rest, media=media, image_token=wrapped.image_token)


def _dual(module: Any, *other_tables: Callable[[Config], Table]) -> Family:
    length = lambda config: config.text.encoder.max_positions
    processor = lambda config, hf, wrapped: EncoderProcessor(wrapped, length(config))
    return Family(module.config_from_hf, lambda config, hf: module.table(config), processor, other_tables)


def _tower(config_from_hf: Callable[[Any], Any], *tables: Callable[[Any], Table]) -> Family:
    """An image encoder alone."""
    first, *others = tables
    processor = lambda config, hf, wrapped: EncoderProcessor(wrapped)
    return Family(config_from_hf, lambda config, hf: first(config), processor, tuple(others))


def _first_token(module: Any, *tables: Callable[[VitConfig], Table]) -> Family:
    """An image encoder whose class token stands for the image."""
    config_from_hf = lambda hf: ImageTowerConfig(encoder=module.config_from_hf(hf), pool="class_token")
    under = lambda table: lambda config: table(config.encoder).under(ours="encoder/")
    return _tower(config_from_hf, *map(under, tables))


_DINOV2 = _first_token(dinov2, dinov2.table, dinov2.state_dict_table)
_EVA_CLIP = _first_token(eva_clip, eva_clip.table)

FAMILIES = {name: _alone(part) for name, part in LANGUAGE.items()} | {
    "idefics": Family(
        idefics.config_from_hf, idefics.table, lambda config, hf, *rest: IdeficsProcessor(*rest, config.vision.image_size)
    ),
    "llava": Family(llava.config_from_hf, llava.table, _every_patch),
    "paligemma": Family(
        paligemma.config_from_hf,
        paligemma.table,
        lambda config, hf, *rest: paligemma.PaliGemmaProcessor(*rest, config.vision.image_size, config.vision.frame_features),
    ),
    "idefics2": Family(
        idefics2.config_from_hf,
        idefics2.table,
        lambda config, hf, *rest: idefics2.Idefics2Processor(*rest, config.connector.latents),
    ),
    "llava_next": Family(llava.config_from_hf, llava.table, _anyres),
    "clip": _dual(clip, open_clip.table),
    "siglip": _dual(siglip),
    "clip_vision_model": _tower(clip.image_config_from_hf, clip.image_table),
    "siglip_vision_model": _tower(siglip.image_config_from_hf, siglip.image_table),
    "dinov2": _DINOV2,
    "dinov2_with_registers": _DINOV2,
    "blip_2_vision_model": _EVA_CLIP,
    "instructblip_vision_model": _EVA_CLIP,
}
