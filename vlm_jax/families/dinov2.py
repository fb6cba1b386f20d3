"""DINOv2 (Oquab et al. 2023): transformers' `Dinov2Model` and `Dinov2WithRegistersModel`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from vlm_jax.config import VitConfig
from vlm_jax.interop.hf_config import activation, plain_block, squares
from vlm_jax.interop.published import class_token_family
from vlm_jax.interop.register import FAMILIES, VISION, VisionFamily
from vlm_jax.interop.rows import DOWN, FROM_HEADS, TO_HEADS, UP, linear, norm, patches, query_key_value
from vlm_jax.interop.table import Empty, Row, Table, row

LAYER = "encoder.layer.{}."
GATE_AND_UP = ("(J F) D -> D F", "(J F) -> F")
REGISTERS = "embeddings.register_tokens"
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet


def table(config: VitConfig) -> Table:
    """Names of hub files <-> the paths of a `Vit`. `save_pretrained` of transformers 5 writes them too."""
    attention = tuple(f"attention.{name}" for name in ("attention.query", "attention.key", "attention.value", "output.dense"))
    gated = (
        *linear(f"{LAYER}mlp.weights_in", ("layers/mlp/gate", "layers/mlp/up"), GATE_AND_UP),
        *linear(f"{LAYER}mlp.weights_out", "layers/mlp/down", DOWN),
    )
    return _table(config, attention, gated)


def state_dict_table(config: VitConfig) -> Table:
    """Names of the modules of transformers 5, as `state_dict` gives them, <-> the paths of a `Vit`."""
    attention = tuple(f"attention.{name}_proj" for name in "qkvo")
    gated = (
        *linear(f"{LAYER}mlp.gate_proj", "layers/mlp/gate", UP),
        *linear(f"{LAYER}mlp.up_proj", "layers/mlp/up", UP),
        *linear(f"{LAYER}mlp.down_proj", "layers/mlp/down", DOWN),
    )
    return _table(config, attention, gated)


def _table(config: VitConfig, attention: tuple[str, ...], gated: tuple[Row, ...]) -> Table:
    """
    Args:
      attention: names of query, key, value and output.
      gated: rows of the feed-forward where it is SwiGLU.
    """
    query_key = zip(attention, query_key_value("layers/attention"), strict=False)
    plain = (*linear(f"{LAYER}mlp.fc1", "layers/mlp/up", UP), *linear(f"{LAYER}mlp.fc2", "layers/mlp/down", DOWN))
    entries = (
        row("embeddings.cls_token", "class_embedding", "() () D -> D"),
        row("embeddings.position_embeddings", "position_embedding", "() T D -> T D"),
        *patches("embeddings.patch_embeddings.projection", config.patch_size, bias=config.patch_bias),
        *(r for name, ours in query_key for r in linear(f"{LAYER}{name}", ours, TO_HEADS, bias=config.block.qkv_bias)),
        *linear(f"{LAYER}{attention[-1]}", "layers/attention/out", FROM_HEADS),
        *(gated if config.block.gated_mlp else plain),
        *norm(f"{LAYER}norm1", "layers/attention_norm"),
        *norm(f"{LAYER}norm2", "layers/mlp_norm"),
        row(f"{LAYER}layer_scale1.lambda1", "layers/attention_scale", "D -> D"),
        row(f"{LAYER}layer_scale2.lambda1", "layers/mlp_scale", "D -> D"),
    )
    if config.registers:
        entries += (row(REGISTERS, "registers", "() R D -> R D"),)
    if config.mask_token:
        entries += (row("embeddings.mask_token", "mask_token", "() D -> D"),)
    return Table(entries + norm("layernorm", "post_norm"))


def with_registers(table: Callable[[VitConfig], Table]) -> Callable[[VitConfig], Table]:
    """The table of a model whose files have a tensor of registers, even of 0."""

    def whole(config: VitConfig) -> Table:
        none = () if config.registers else (Empty(REGISTERS, (1, 0, config.block.width)),)
        return table(config) + Table((), empty=none)

    return whole


def config_from_hf(config: Any) -> VitConfig:
    """`Dinov2Config` or `Dinov2WithRegistersConfig` -> ours, with every token among the features but registers."""
    mlp_width = int(config.hidden_size * config.mlp_ratio)
    gated = config.use_swiglu_ffn
    block = plain_block(
        config,
        # SwiGLU keeps two thirds, rounded up to a multiple of 8.
        mlp_width=(int(mlp_width * 2 / 3) + 7) // 8 * 8 if gated else mlp_width,
        activation="silu" if gated else activation(config.hidden_act),
        gated_mlp=gated,
        qkv_bias=config.qkv_bias,
        layer_scale=True,
    )
    registers = getattr(config, "num_register_tokens", 0)
    return VitConfig(
        **squares(config),
        layers=config.num_hidden_layers,
        block=block,
        class_token="kept",
        registers=registers,
        mask_token=getattr(config, "use_mask_token", True),
        patch_bias=True,
        pre_norm=False,
        antialias=config.model_type == "dinov2_with_registers",
        mean=MEAN,
        std=STD,
    )


def vision_from_hf(config: Any) -> VitConfig:
    """As `config_from_hf`, with registers among the features: as larger models read them."""
    return dataclasses.replace(config_from_hf(config), keep_registers=True)


FAMILIES.add("dinov2")(class_token_family(config_from_hf, table, state_dict_table))
FAMILIES.add("dinov2_with_registers")(class_token_family(config_from_hf, *map(with_registers, (table, state_dict_table))))
VISION.add("dinov2")(VisionFamily(vision_from_hf, table, prefix="", any_size=True))
VISION.add("dinov2_with_registers")(VisionFamily(vision_from_hf, with_registers(table), prefix="", any_size=True))
