"""SigLIP (Zhai et al. 2023), and SigLIP 2 of a fixed resolution: transformers' `SiglipModel`."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from vlm_jax.config import DualEncoderConfig, ImageTowerConfig, TextTowerConfig
from vlm_jax.interop import vit
from vlm_jax.interop.clip import text_encoder, text_rows
from vlm_jax.interop.hf_config import require
from vlm_jax.interop.rows import UP, linear
from vlm_jax.interop.table import Table, row


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
    return vit.rows(config.encoder).under(ours="encoder/") + vit.pooling_head().under(ours="pool/")


def config_from_hf(config: Any) -> DualEncoderConfig:
    """`SiglipConfig` -> ours."""
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
    """`SiglipVisionConfig` -> ours.

    Raises:
      ValueError: a tower without a pooling head.
    """
    require(config, vision_use_head=True)
    encoder = dataclasses.replace(vit.config_from_hf(config), pooling_head=False)
    return ImageTowerConfig(encoder=encoder, pool="attention")
