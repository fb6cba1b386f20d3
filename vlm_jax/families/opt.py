"""OPT (Zhang et al. 2022): `OPTForCausalLM`."""

from __future__ import annotations

from typing import Any

from vlm_jax.config import BlockConfig, DecoderConfig, LearnedPositionsConfig, NormConfig
from vlm_jax.interop.hf_config import activation, plain_decoder, require
from vlm_jax.interop.published import register_language
from vlm_jax.interop.register import LanguageFamily
from vlm_jax.interop.rows import DOWN, FROM_HEADS, TO_HEADS, UP, linear, norm, query_key_value
from vlm_jax.interop.table import Copy, Table, row

MODEL = "model.decoder."
LAYER = MODEL + "layers.{}."


def table(config: DecoderConfig) -> Table:
    """Published names <-> the paths of a `Decoder`."""
    bias, heads = config.block.qkv_bias, zip("qkv", query_key_value("layers/attention"), strict=True)
    rows = [
        row(f"{MODEL}embed_tokens.weight", "embedding", "V D -> V D"),
        row(f"{MODEL}embed_positions.weight", "position_embedding", "T D -> T D"),
        *(r for name, ours in heads for r in linear(f"{LAYER}self_attn.{name}_proj", ours, TO_HEADS, bias=bias)),
        *linear(f"{LAYER}self_attn.out_proj", "layers/attention/out", FROM_HEADS, bias=bias),
        *linear(f"{LAYER}fc1", "layers/mlp/up", UP, bias=bias),
        *linear(f"{LAYER}fc2", "layers/mlp/down", DOWN, bias=bias),
        *norm(f"{LAYER}self_attn_layer_norm", "layers/attention_norm"),
        *norm(f"{LAYER}final_layer_norm", "layers/mlp_norm"),
    ]
    if config.final_norm:
        rows += norm(f"{MODEL}final_layer_norm", "final_norm")
    if config.embedding_width is not None:
        rows.append(row(f"{MODEL}project_in.weight", "project_in/kernel", "D O -> O D"))
        rows.append(row(f"{MODEL}project_out.weight", "project_out/kernel", "O D -> D O"))
    if config.tied_head:
        return Table(tuple(rows), copies=(Copy("lm_head.weight", of=f"{MODEL}embed_tokens.weight"),))
    return Table((*rows, row("lm_head.weight", "lm_head/kernel", "V D -> D V")))


def config_from_hf(config: Any) -> DecoderConfig:
    """`OPTConfig` -> ours.

    OPT-350M alone has its norms behind attention and feed-forward, none behind the last layer, and narrower embeddings.
    """
    require(config, layer_norm_elementwise_affine=True)
    narrow = config.word_embed_proj_dim != config.hidden_size
    block = BlockConfig(
        width=config.hidden_size,
        heads=config.num_attention_heads,
        kv_heads=config.num_attention_heads,
        head_width=config.hidden_size // config.num_attention_heads,
        mlp_width=config.ffn_dim,
        activation=activation(config.activation_function),
        gated_mlp=False,
        norm=NormConfig(kind="layer", eps=1e-5),
        qkv_bias=config.enable_bias,
        out_bias=config.enable_bias,
        mlp_bias=config.enable_bias,
        post_norm=not config.do_layer_norm_before,
    )
    return plain_decoder(
        config,
        block,
        LearnedPositionsConfig(offset=2),
        embedding_width=config.word_embed_proj_dim if narrow else None,
        final_norm=config.do_layer_norm_before and not getattr(config, "_remove_final_layer_norm", False),
    )


register_language("opt", part=LanguageFamily(config_from_hf, table))
