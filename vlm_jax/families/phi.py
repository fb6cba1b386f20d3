"""Phi-1, 1.5 and 2 (Gunasekar et al. 2023; Li et al. 2023), a language model of MoE-LLaVA: `PhiForCausalLM`."""

from __future__ import annotations

from typing import Any

from vlm_jax.config import DecoderConfig
from vlm_jax.interop.hf_config import plain_block, plain_decoder, require, rope
from vlm_jax.interop.published import register_language
from vlm_jax.interop.register import LanguageFamily
from vlm_jax.interop.rows import DOWN, FROM_HEADS, TO_HEADS, UP, linear, norm, query_key_value
from vlm_jax.interop.table import Table, row

LAYER = "model.layers.{}."


def table(config: DecoderConfig) -> Table:
    """Published names <-> the paths of a `Decoder`."""
    heads = zip("qkv", query_key_value("layers/attention"), strict=True)
    rows = (
        row("model.embed_tokens.weight", "embedding", "V D -> V D"),
        *(r for name, ours in heads for r in linear(f"{LAYER}self_attn.{name}_proj", ours, TO_HEADS)),
        *linear(f"{LAYER}self_attn.dense", "layers/attention/out", FROM_HEADS),
        *linear(f"{LAYER}mlp.fc1", "layers/mlp/up", UP),
        *linear(f"{LAYER}mlp.fc2", "layers/mlp/down", DOWN),
        *norm(f"{LAYER}input_layernorm", "layers/attention_norm"),
        *norm("model.final_layernorm", "final_norm"),
        *linear("lm_head", "lm_head", ("V D -> D V", "V -> V")),
    )
    return Table(rows)


def config_from_hf(config: Any) -> DecoderConfig:
    """`PhiConfig` -> ours."""
    require(config, qk_layernorm=False, tie_word_embeddings=False)
    block = plain_block(config, kv_heads=config.num_key_value_heads, parallel_residual=True, shared_norm=True)
    return plain_decoder(config, block, rope(config), head_bias=True)


register_language("phi", part=LanguageFamily(config_from_hf, table))
