"""SigLIP (Zhai et al. 2023), and SigLIP 2 of a fixed resolution: transformers' `SiglipModel`."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from vlm_jax.config import DualEncoderConfig, ImageTowerConfig, TextTowerConfig, VitConfig
from vlm_jax.families import clip
from vlm_jax.families.clip import text_encoder, text_rows
from vlm_jax.interop.hf_config import require
from vlm_jax.interop.published import dual_encoder_family, image_tower_family
from vlm_jax.interop.register import FAMILIES, VISION, VisionFamily
from vlm_jax.interop.rows import DOWN, FROM_HEADS, FUSED, UP, linear, norm, query_key_value
from vlm_jax.interop.table import Table, row

HALF = (0.5, 0.5, 0.5)


def table(config: DualEncoderConfig) -> Table:
    """Published names <-> the paths of a `DualEncoder`."""
    entries = (
        *linear("text_model.head", "text/projection", UP),
        row("logit_scale", "logit_scale", "() ->"),
        row("logit_bias", "logit_bias", "() ->"),
    )
    return _image_rows(config.image).under("vision_model.", "image/") + text_rows(config.text.encoder) + Table(entries)


def image_table(config: ImageTowerConfig) -> Table:
    """Names of `SiglipVisionModel`, with the `vision_model.` of hub files or without it <-> the paths of an `ImageTower`."""
    return _image_rows(config).under("[vision_model.]")


def _image_rows(config: ImageTowerConfig) -> Table:
    tower = vision_table(config.encoder).under(ours="encoder/")
    return tower + pooling_head().under(ours="pool/") if config.pool == "attention" else tower


def config_from_hf(config: Any) -> DualEncoderConfig:
    """`SiglipConfig` -> ours.

    Raises:
      ValueError: a vision tower without a pooling head, where transformers has no embedding of an image either.
    """
    require(config.vision_config, vision_use_head=True)
    return DualEncoderConfig(
        image=image_config_from_hf(config.vision_config),
        text=TextTowerConfig(
            encoder=text_encoder(config.text_config),
            causal=False,
            pool="last",
            projection=config.text_config.projection_size,
            projection_bias=True,
        ),
        loss="sigmoid",
        logit_scale=math.log(10.0),
        logit_bias=-10.0,
    )


def image_config_from_hf(config: Any) -> ImageTowerConfig:
    """`SiglipVisionConfig` -> ours; without a pooling head it gives features alone."""
    encoder = vision_from_hf(config)
    pool = "attention" if encoder.pooling_head else "none"
    return ImageTowerConfig(encoder=dataclasses.replace(encoder, pooling_head=False), pool=pool)


def vision_table(config: VitConfig) -> Table:
    """Names of the vision tower, without a prefix <-> the paths of a `Vit`."""
    tower = clip.vision_table(config)
    return tower + pooling_head().under(ours="pooling_head/") if config.pooling_head else tower


def pooling_head() -> Table:
    """SigLIP's head <-> the paths of an `AttentionPool`."""
    entries = (
        row("probe", "probe", "() () D -> D"),
        *linear("attention.in_proj", query_key_value("attention"), FUSED, dot="_"),
        *linear("attention.out_proj", "attention/out", FROM_HEADS),
        *norm("layernorm", "norm"),
        *linear("mlp.fc1", "mlp/up", UP),
        *linear("mlp.fc2", "mlp/down", DOWN),
    )
    return Table(entries).under("head.")


def vision_from_hf(config: Any, **choices: Any) -> VitConfig:
    """`SiglipVisionConfig`, or another that names its sizes so -> ours.

    Args:
      choices: what of `VitConfig` differs from SigLIP's.
    """
    own = dict(class_token="none", patch_bias=True, pre_norm=False, mean=HALF, std=HALF)
    own["pooling_head"] = getattr(config, "vision_use_head", True)
    return clip.vision_from_hf(config, **own | choices)


VISION.add("siglip_vision_model")(VisionFamily(vision_from_hf, vision_table))
FAMILIES.add("siglip")(dual_encoder_family(config_from_hf, table))
FAMILIES.add("siglip_vision_model")(image_tower_family(image_config_from_hf, image_table))
