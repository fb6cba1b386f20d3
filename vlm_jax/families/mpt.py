"""MPT (MosaicML 2023), the language model of OpenFlamingo: `MptForCausalLM`."""

from __future__ import annotations

from typing import Any

from vlm_jax.config import AlibiConfig, BlockConfig, DecoderConfig, NormConfig
from vlm_jax.interop.hf_config import require
from vlm_jax.interop.published import register_language
from vlm_jax.interop.register import LanguageFamily
from vlm_jax.interop.rows import DOWN, FROM_HEADS, FUSED, UP, linear, norm, query_key_value
from vlm_jax.interop.table import Copy, Table, row

MODEL = "transformer."
LAYER = MODEL + "blocks.{}."


def table(config: DecoderConfig) -> Table:
    """Published names <-> the paths of a `Decoder`."""
    attention = "layers/attention"
    rows = (
        row(f"{MODEL}wte.weight", "embedding", "V D -> V D"),
        *linear(f"{LAYER}attn.Wqkv", query_key_value(attention), FUSED, bias=False),
        *linear(f"{LAYER}attn.out_proj", f"{attention}/out", FROM_HEADS, bias=False),
        *linear(f"{LAYER}ffn.up_proj", "layers/mlp/up", UP, bias=False),
        *linear(f"{LAYER}ffn.down_proj", "layers/mlp/down", DOWN, bias=False),
        *norm(f"{LAYER}norm_1", "layers/attention_norm", bias=False),
        *norm(f"{LAYER}norm_2", "layers/mlp_norm", bias=False),
        *norm(f"{MODEL}norm_f", "final_norm", bias=False),
    )
    if config.tied_head:
        return Table(rows, copies=(Copy("lm_head.weight", of=f"{MODEL}wte.weight"),))
    return Table((*rows, row("lm_head.weight", "lm_head/kernel", "V D -> D V")))


def config_from_hf(config: Any) -> DecoderConfig:
    """`MptConfig` -> ours.

    Whatever `no_bias` says, there are no biases, as in transformers; a file that has some is refused by its names.
    """
    require(config, logit_scale=None, expansion_ratio=4)  # transformers makes it 4 whatever is said
    attention = config.attn_config
    require(
        attention, attn_type="multihead_attention", clip_qkv=None, softmax_scale=None, prefix_lm=False, qk_ln=False, alibi=True
    )
    return alibi_decoder(
        config,
        alibi_bias_max=attention.alibi_bias_max,
        mlp_ratio=4,
        eps=config.layer_norm_epsilon,
        qk_norm=False,
        tied_head=config.tie_word_embeddings,
    )


def alibi_decoder(
    config: Any, *, alibi_bias_max: float, mlp_ratio: int, eps: float, qk_norm: bool, tied_head: bool
) -> DecoderConfig:
    """MosaicML's decoder, without biases.

    Args:
      config: the settings that MPT and its predecessor call the same.
    """
    block = BlockConfig(
        width=config.d_model,
        heads=config.n_heads,
        kv_heads=config.n_heads,
        head_width=config.d_model // config.n_heads,
        mlp_width=mlp_ratio * config.d_model,
        activation="gelu",
        gated_mlp=False,
        norm=NormConfig(kind="layer", eps=eps, bias=False),
        qkv_bias=False,
        out_bias=False,
        mlp_bias=False,
        qk_norm=qk_norm,
    )
    return DecoderConfig(
        vocab_size=config.vocab_size,
        layers=config.n_layers,
        block=block,
        positions=AlibiConfig(max_bias=float(alibi_bias_max)),
        max_positions=config.max_seq_len,
        window=None,
        tied_head=tied_head,
    )


register_language("mpt", part=LanguageFamily(config_from_hf, table, prefix=MODEL))
