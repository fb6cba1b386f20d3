"""GPT-NeoX (Black et al. 2022), Pythia, and RedPajama, the language model of OpenFlamingo: `GPTNeoXForCausalLM`."""

from __future__ import annotations

from typing import Any

from vlm_jax.config import DecoderConfig
from vlm_jax.interop.hf_config import plain_block, plain_decoder, rope
from vlm_jax.interop.published import register_language
from vlm_jax.interop.register import LanguageFamily
from vlm_jax.interop.rows import DOWN, FROM_HEADS, FUSED_BY_HEAD, UP, linear, norm, query_key_value
from vlm_jax.interop.table import Copy, Table, row

MODEL = "gpt_neox."
LAYER = MODEL + "layers.{}."


def table(config: DecoderConfig) -> Table:
    """Published names <-> the paths of a `Decoder`."""
    bias, fused = config.block.qkv_bias, query_key_value("layers/attention")
    rows = [
        row(f"{MODEL}embed_in.weight", "embedding", "V D -> V D"),
        *linear(f"{LAYER}attention.query_key_value", fused, FUSED_BY_HEAD, bias=bias),
        *linear(f"{LAYER}attention.dense", "layers/attention/out", FROM_HEADS, bias=bias),
        *linear(f"{LAYER}mlp.dense_h_to_4h", "layers/mlp/up", UP),
        *linear(f"{LAYER}mlp.dense_4h_to_h", "layers/mlp/down", DOWN),
        *norm(f"{LAYER}input_layernorm", "layers/attention_norm"),
        *norm(f"{LAYER}post_attention_layernorm", "layers/mlp_norm"),
        *norm(f"{MODEL}final_layer_norm", "final_norm"),
    ]
    copies = (Copy("embed_out.weight", of=f"{MODEL}embed_in.weight"),)
    if not config.tied_head:
        rows.append(row("embed_out.weight", "lm_head/kernel", "V D -> D V"))
        copies = ()
    buffers = ("bias", "masked_bias", "rotary_emb.inv_freq")
    return Table(tuple(rows), copies, ignored=tuple(f"{LAYER}attention.{name}" for name in buffers))


def config_from_hf(config: Any) -> DecoderConfig:
    """`GPTNeoXConfig` -> ours."""
    bias = config.attention_bias
    block = plain_block(config, qkv_bias=bias, out_bias=bias, parallel_residual=config.use_parallel_residual)
    return plain_decoder(config, block, rope(config))


register_language("gpt_neox", part=LanguageFamily(config_from_hf, table, prefix=MODEL, head="embed_out."))
