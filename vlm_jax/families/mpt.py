"""MPT (MosaicML 2023), the language model of OpenFlamingo: `MptForCausalLM`."""

from __future__ import annotations

from typing import Any

from vlm_jax.config import AlibiConfig, BlockConfig, DecoderConfig, NormConfig
from vlm_jax.interop.hf_config import require
from vlm_jax.interop.published import register_language
from vlm_jax.interop.register import LanguageFamily
from vlm_jax.interop.table import Copy, Table, row

MODEL = "transformer."
LAYER = MODEL + "blocks.{}."


def table(config: DecoderConfig) -> Table:
    """Published names <-> the paths of a `Decoder`."""
    attention = "layers/attention/"
    norms = (
        (f"{LAYER}norm_1", "layers/attention_norm"),
        (f"{LAYER}norm_2", "layers/mlp_norm"),
        (f"{MODEL}norm_f", "final_norm"),
    )
    query_key_value = tuple(f"{attention}{name}/kernel" for name in ("query", "key", "value"))
    rows = (
        row(f"{MODEL}wte.weight", "embedding", "V D -> V D"),
        row(f"{LAYER}attn.Wqkv.weight", query_key_value, "(J N H) D -> D N H"),
        row(f"{LAYER}attn.out_proj.weight", f"{attention}out/kernel", "D (N H) -> N H D"),
        row(f"{LAYER}ffn.up_proj.weight", "layers/mlp/up/kernel", "F D -> D F"),
        row(f"{LAYER}ffn.down_proj.weight", "layers/mlp/down/kernel", "D F -> F D"),
        *(row(f"{name}.weight", f"{ours}/scale", "D -> D") for name, ours in norms),
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
    block = BlockConfig(
        width=config.d_model,
        heads=config.n_heads,
        kv_heads=config.n_heads,
        head_width=config.d_model // config.n_heads,
        mlp_width=4 * config.d_model,
        activation="gelu",
        gated_mlp=False,
        norm=NormConfig(kind="layer", eps=config.layer_norm_epsilon, bias=False),
        qkv_bias=False,
        out_bias=False,
        mlp_bias=False,
    )
    return DecoderConfig(
        vocab_size=config.vocab_size,
        layers=config.n_layers,
        block=block,
        positions=AlibiConfig(max_bias=float(attention.alibi_bias_max)),
        max_positions=config.max_seq_len,
        window=None,
        tied_head=config.tie_word_embeddings,
    )


register_language("mpt", part=LanguageFamily(config_from_hf, table, prefix=MODEL))
