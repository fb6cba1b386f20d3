"""EVA-CLIP's ViT-g (Sun et al. 2023) as BLIP-2 and InstructBLIP have it: transformers' `Blip2VisionModel`."""

from __future__ import annotations

from typing import Any

from vlm_jax.config import VitConfig
from vlm_jax.interop.hf_config import plain_block, squares
from vlm_jax.interop.published import class_token_family
from vlm_jax.interop.register import FAMILIES
from vlm_jax.interop.rows import FROM_HEADS, FUSED, LAYER, linear, norm, norms_and_mlp, patches, query_key_value
from vlm_jax.interop.table import Table, row


def table(config: VitConfig) -> Table:
    """Table of the encoder; published names with or without the `vision_model.` of whole models."""
    return rows(config).under("[vision_model.]")


def rows(config: VitConfig) -> Table:
    """Published names <-> the paths of a `Vit`."""
    entries = (
        row("embeddings.class_embedding", "class_embedding", "() () D -> D"),
        row("embeddings.position_embedding", "position_embedding", "() T D -> T D"),
        *patches("embeddings.patch_embedding", config.patch_size, bias=config.patch_bias),
        *linear(f"{LAYER}self_attn.qkv", query_key_value("layers/attention"), FUSED, bias=config.block.qkv_bias),
        *linear(f"{LAYER}self_attn.projection", "layers/attention/out", FROM_HEADS),
        *norms_and_mlp(config.block),
    )
    return Table(entries + norm("post_layernorm", "post_norm"))


def config_from_hf(config: Any) -> VitConfig:
    """`Blip2VisionConfig` or `InstructBlipVisionConfig` -> ours, with what the Q-Former reads: every token, normalised."""
    return VitConfig(
        **squares(config),
        layers=config.num_hidden_layers,
        block=plain_block(config, qkv_bias=config.qkv_bias),
        patch_bias=True,
        pre_norm=False,
        class_token="kept",
    )


FAMILIES.add("blip_2_vision_model", "instructblip_vision_model")(class_token_family(config_from_hf, table))
