"""LLaMA (Touvron et al. 2023), Vicuna and Mistral (Jiang et al. 2023): `LlamaForCausalLM`, `MistralForCausalLM`."""

from __future__ import annotations

from typing import Any

from vlm_jax.config import BlockConfig, DecoderConfig, NormConfig
from vlm_jax.interop.hf_config import activation, plain_decoder, rope
from vlm_jax.interop.published import register_language
from vlm_jax.interop.register import LanguageFamily
from vlm_jax.interop.table import Copy, Table, row

LAYER = "model.layers.{}."
PROJECTIONS = (("q", "query", "(N H)", "N H"), ("k", "key", "(K H)", "K H"), ("v", "value", "(K H)", "K H"))


def table(config: DecoderConfig) -> Table:
    """Published names <-> the paths of a `Decoder`."""
    return body(config) + head(config)


def body(config: DecoderConfig) -> Table:
    """All but the embedding and the head."""
    maps = (("gate", "F D -> D F"), ("up", "F D -> D F"), ("down", "D F -> F D"))
    rows = [row(f"{LAYER}mlp.{name}_proj.weight", f"layers/mlp/{name}/kernel", axes) for name, axes in maps]
    if config.block.mlp_bias:
        rows += [row(f"{LAYER}mlp.{name}_proj.bias", f"layers/mlp/{name}/bias", "F -> F") for name, _ in maps]
    return attention(config) + Table(tuple(rows))


def attention(config: DecoderConfig) -> Table:
    """The attention, and all norms."""
    block = config.block
    rows = [
        row("model.norm.weight", "final_norm/scale", "D -> D"),
        row(f"{LAYER}input_layernorm.weight", "layers/attention_norm/scale", "D -> D"),
        row(f"{LAYER}post_attention_layernorm.weight", "layers/mlp_norm/scale", "D -> D"),
        row(f"{LAYER}self_attn.o_proj.weight", "layers/attention/out/kernel", "D (N H) -> N H D"),
    ]
    for name, ours, published, split in PROJECTIONS:
        rows.append(
            row(f"{LAYER}self_attn.{name}_proj.weight", f"layers/attention/{ours}/kernel", f"{published} D -> D {split}")
        )
        if block.qkv_bias:
            rows.append(row(f"{LAYER}self_attn.{name}_proj.bias", f"layers/attention/{ours}/bias", f"{published} -> {split}"))
    if block.out_bias:
        rows.append(row(f"{LAYER}self_attn.o_proj.bias", "layers/attention/out/bias", "D -> D"))
    return Table(tuple(rows), ignored=(f"{LAYER}self_attn.rotary_emb.inv_freq",))


def head(config: DecoderConfig) -> Table:
    """The embedding and the head."""
    rows = (row("model.embed_tokens.weight", "embedding", "V D -> V D"),)
    if config.tied_head:
        return Table(rows, copies=(Copy("lm_head.weight", of="model.embed_tokens.weight"),))
    return Table((*rows, row("lm_head.weight", "lm_head/kernel", "V D -> D V")))


def config_from_hf(config: Any) -> DecoderConfig:
    """`LlamaConfig` or `MistralConfig` -> ours."""
    positions = rope(config)
    if positions.share != 1.0:
        raise ValueError(f"{type(config).__name__}: partial_rotary_factor={positions.share}; this model rotates whole heads")
    attention_bias = getattr(config, "attention_bias", False)
    block = BlockConfig(
        width=config.hidden_size,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_width=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        mlp_width=config.intermediate_size,
        activation=activation(config.hidden_act),
        gated_mlp=True,
        norm=NormConfig(kind="rms", eps=config.rms_norm_eps),
        qkv_bias=attention_bias,
        out_bias=attention_bias,
        mlp_bias=getattr(config, "mlp_bias", False),
    )
    return plain_decoder(config, block, positions, window=getattr(config, "sliding_window", None))


register_language("llama", "mistral", part=LanguageFamily(config_from_hf, table))
