"""CLIP (Radford et al. 2021): transformers' `CLIPModel`, `CLIPVisionModel` and `CLIPVisionModelWithProjection`.

SigLIP's towers have its names, and IDEFICS a copy of its vision tower.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from vlm_jax.config import (
    DecoderConfig,
    DualEncoderConfig,
    ImageTowerConfig,
    LearnedPositionsConfig,
    TextTowerConfig,
    VitConfig,
)
from vlm_jax.families import open_clip
from vlm_jax.interop.hf_config import plain_block, squares
from vlm_jax.interop.published import dual_encoder_family, image_tower_family
from vlm_jax.interop.register import FAMILIES, VISION, VisionFamily
from vlm_jax.interop.rows import attention, norm, norms_and_mlp, patches
from vlm_jax.interop.table import Table, row


def table(config: DualEncoderConfig) -> Table:
    """Published names <-> the paths of a `DualEncoder`."""
    entries = (
        row("text_projection.weight", "text/projection/kernel", "F D -> D F"),
        row("logit_scale", "logit_scale", "->"),
    )
    return image_table(config.image).under(ours="image/") + text_rows(config.text.encoder) + Table(entries)


def image_table(config: ImageTowerConfig) -> Table:
    """Names of `CLIPVisionModel` or `CLIPVisionModelWithProjection` <-> the paths of an `ImageTower`."""
    if config.projection is None:
        return vision_table(config.encoder).under("[vision_model.]", "encoder/")
    projection = row("visual_projection.weight", "projection/kernel", "F D -> D F")
    return vision_table(config.encoder).under("vision_model.", "encoder/") + Table((projection,))


def text_rows(config: DecoderConfig) -> Table:
    """Names of the text tower without its projection, which SigLIP's are too."""
    entries = (
        row("embeddings.token_embedding.weight", "embedding", "V D -> V D"),
        row("embeddings.position_embedding.weight", "position_embedding", "T D -> T D"),
        *attention(config.block),
        *norms_and_mlp(config.block),
        *norm("final_layer_norm", "final_norm"),
    )
    return Table(entries, ignored=("embeddings.position_ids",)).under("text_model.", "text/encoder/")


def config_from_hf(config: Any) -> DualEncoderConfig:
    """`CLIPConfig` -> ours.

    Raises:
      ValueError: several end tokens or none, where transformers could not pool either.
    """
    end = config.text_config.eos_token_id
    if not isinstance(end, int):
        raise ValueError(f"CLIPTextConfig: eos_token_id={end}; only one number is implemented")
    return DualEncoderConfig(
        image=_image(config.vision_config, config.projection_dim),
        text=TextTowerConfig(
            encoder=text_encoder(config.text_config),
            causal=True,
            pool="end_token",
            # Configs from before transformers knew the end token say 2, and mean the greatest number.
            end_token=None if end == 2 else end,
            projection=config.projection_dim,
            projection_bias=False,
        ),
        loss="softmax",
        logit_scale=float(config.logit_scale_init_value),
    )


def image_config_from_hf(config: Any) -> ImageTowerConfig:
    """`CLIPVisionConfig`, as `CLIPVisionModel` or `CLIPVisionModelWithProjection` saved it -> ours."""
    projected = "CLIPVisionModelWithProjection" in (config.architectures or ())
    return _image(config, config.projection_dim if projected else None)


def _image(config: Any, projection: int | None) -> ImageTowerConfig:
    encoder = dataclasses.replace(vision_from_hf(config), class_token="kept")
    return ImageTowerConfig(encoder=encoder, pool="class_token", projection=projection)


def text_encoder(config: Any) -> DecoderConfig:
    """`CLIPTextConfig` or `SiglipTextConfig` -> ours."""
    return DecoderConfig(
        vocab_size=config.vocab_size,
        layers=config.num_hidden_layers,
        block=plain_block(config),
        positions=LearnedPositionsConfig(),
        max_positions=config.max_position_embeddings,
        window=None,
        tied_head=True,
    )


def vision_table(config: VitConfig) -> Table:
    """Names of the vision tower, without a prefix <-> the paths of a `Vit`."""
    entries = (
        *patches("embeddings.patch_embedding", config.patch_size, bias=config.patch_bias),
        row("embeddings.position_embedding.weight", "position_embedding", "T D -> T D"),
        *attention(config.block),
        *norms_and_mlp(config.block),
    )
    if config.class_token != "none":
        entries += (row("embeddings.class_embedding", "class_embedding", "D -> D"),)
    if config.pre_norm:
        entries += norm("pre_layrnorm", "pre_norm")
    if config.post_norm != "none":
        entries += norm("post_layernorm", "post_norm")
    return Table(entries, ignored=("embeddings.position_ids",))


def vision_from_hf(config: Any, **choices: Any) -> VitConfig:
    """`CLIPVisionConfig`, or another that names its sizes so -> ours, with the default choice of features.

    Args:
      choices: what of `VitConfig` differs from CLIP's.
    """
    return VitConfig(**squares(config), layers=config.num_hidden_layers, block=plain_block(config), **choices)


VISION.add("clip_vision_model")(VisionFamily(vision_from_hf, vision_table))
FAMILIES.add("clip")(dual_encoder_family(config_from_hf, table, open_clip.table))
FAMILIES.add("clip_vision_model")(image_tower_family(image_config_from_hf, image_table))
