"""The vision towers of CLIP and SigLIP: transformers' `CLIPVisionModel`, IDEFICS's copy of it, and `SiglipVisionModel`."""

from __future__ import annotations

from typing import Any

from vlm_jax.config import VitConfig
from vlm_jax.interop.hf_config import plain_block, require
from vlm_jax.interop.rows import (
    DOWN,
    FROM_HEADS,
    FUSED,
    UP,
    attention,
    linear,
    norm,
    norms_and_mlp,
    patches,
    query_key_value,
)
from vlm_jax.interop.table import Table, row

HALF = (0.5, 0.5, 0.5)


def table(config: VitConfig) -> Table:
    """Of the tower alone: published names with the `vision_model.` of hub files or without it."""
    return rows(config).under("[vision_model.]")


def rows(config: VitConfig) -> Table:
    """Published names <-> the paths of a `Vit`."""
    entries = (
        *patches("embeddings.patch_embedding", config.patch_size, config.patch_bias),
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
    tower = Table(entries, ignored=("embeddings.position_ids",))
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


def config_from_hf(config: Any) -> VitConfig:
    """`CLIPVisionConfig`, `SiglipVisionConfig` or that of an IDEFICS -> ours, with the default choice of features.

    Raises:
      ValueError: another kind of config, or a setting that our model does not have.
    """
    match config.model_type:
        case "clip_vision_model" | "idefics_vision":
            choices = {}
        case "siglip_vision_model":
            choices = dict(class_token="none", patch_bias=True, pre_norm=False, mean=HALF, std=HALF)
            choices["pooling_head"] = getattr(config, "vision_use_head", True)
        case "idefics2_vision":
            choices = dict(class_token="none", patch_bias=True, pre_norm=False, mean=HALF, std=HALF, positions="bucketed")
        case other:
            known = "clip_vision_model, idefics_vision, idefics2_vision or siglip_vision_model"
            raise ValueError(f"vision tower {other!r}; expected {known}")
    return VitConfig(**squares(config), layers=config.num_hidden_layers, block=plain_block(config), **choices)


def squares(config: Any) -> dict[str, int]:
    """The sizes of pictures and patches of any vision config.

    Raises:
      ValueError: they are not square, or not of three colours.
    """
    require(config, num_channels=3)
    sizes = {}
    for name in ("image_size", "patch_size"):
        sizes[name] = getattr(config, name)
        if not isinstance(sizes[name], int):
            raise ValueError(f"{type(config).__name__}: {name}={sizes[name]}; only squares (one number) are implemented")
    return sizes
