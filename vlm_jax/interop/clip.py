"""The vision towers of CLIP (Radford et al. 2021; `CLIPVisionModel`, IDEFICS's copy of it) and SigLIP (Zhai et al. 2023)."""

from __future__ import annotations

from typing import Any

from vlm_jax.config import BlockConfig, NormConfig, VitConfig
from vlm_jax.interop.hf_config import activation, require
from vlm_jax.interop.table import Table, row

LAYER = "encoder.layers.{}."


def table(config: VitConfig) -> Table:
    """Of the tower alone: published names with the `vision_model.` of hub files or without it."""
    return rows(config).under("[vision_model.]")


def rows(config: VitConfig) -> Table:
    """Published names <-> the paths of a `Vit`."""
    attention = [
        entry
        for published, ours in (("q", "query"), ("k", "key"), ("v", "value"))
        for entry in (
            row(f"{LAYER}self_attn.{published}_proj.weight", f"layers/attention/{ours}/kernel", "(N H) D -> D N H"),
            row(f"{LAYER}self_attn.{published}_proj.bias", f"layers/attention/{ours}/bias", "(N H) -> N H"),
        )
    ]
    norms = [(f"{LAYER}layer_norm1", "layers/attention_norm"), (f"{LAYER}layer_norm2", "layers/mlp_norm")]
    norms += [("pre_layrnorm", "pre_norm")] if config.pre_norm else []
    norms += [("post_layernorm", "post_norm")] if config.post_norm != "none" else []
    patch = config.patch_size
    entries = [
        row("embeddings.patch_embedding.weight", "patch_embedding/kernel", "D C Y X -> (Y X C) D", C=3, Y=patch, X=patch),
        row("embeddings.position_embedding.weight", "position_embedding", "T D -> T D"),
        *attention,
        row(f"{LAYER}self_attn.out_proj.weight", "layers/attention/out/kernel", "D (N H) -> N H D"),
        row(f"{LAYER}self_attn.out_proj.bias", "layers/attention/out/bias", "D -> D"),
        row(f"{LAYER}mlp.fc1.weight", "layers/mlp/up/kernel", "F D -> D F"),
        row(f"{LAYER}mlp.fc1.bias", "layers/mlp/up/bias", "F -> F"),
        row(f"{LAYER}mlp.fc2.weight", "layers/mlp/down/kernel", "D F -> F D"),
        row(f"{LAYER}mlp.fc2.bias", "layers/mlp/down/bias", "D -> D"),
        *(row(f"{published}.weight", f"{ours}/scale", "D -> D") for published, ours in norms),
        *(row(f"{published}.bias", f"{ours}/bias", "D -> D") for published, ours in norms),
    ]
    if config.class_token != "none":
        entries.append(row("embeddings.class_embedding", "class_embedding", "D -> D"))
    if config.patch_bias:
        entries.append(row("embeddings.patch_embedding.bias", "patch_embedding/bias", "D -> D"))
    return Table(tuple(entries), ignored=("embeddings.position_ids",))


def config_from_hf(config: Any) -> VitConfig:
    """`CLIPVisionConfig`, `IdeficsVisionConfig` or `SiglipVisionConfig` -> ours, with the default choice of features."""
    require(config, num_channels=3)
    for name in ("image_size", "patch_size"):
        if not isinstance(getattr(config, name), int):
            raise ValueError(
                f"{type(config).__name__}: {name}={getattr(config, name)}; only squares (one number) are implemented"
            )
    block = BlockConfig(
        width=config.hidden_size,
        heads=config.num_attention_heads,
        kv_heads=config.num_attention_heads,
        head_width=config.hidden_size // config.num_attention_heads,
        mlp_width=config.intermediate_size,
        activation=activation(config.hidden_act),
        gated_mlp=False,
        norm=NormConfig(kind="layer", eps=config.layer_norm_eps),
        qkv_bias=True,
        out_bias=True,
        mlp_bias=True,
    )
    siglip = config.model_type == "siglip_vision_model"
    return VitConfig(
        image_size=config.image_size,
        patch_size=config.patch_size,
        layers=config.num_hidden_layers,
        block=block,
        class_token="none" if siglip else "dropped",
        patch_bias=siglip,
        pre_norm=not siglip,
    )
