"""MosaicGPT (MosaicML 2023): MPT-1B, the language model of OpenFlamingo-3B, whose code is in its hub repository.

MPT's predecessor, with other names and layer norms of the queries and keys; the code is that of mosaicml/examples
(`examples/llm/src/models/mosaic_gpt`, April 2023).
"""

from __future__ import annotations

import dataclasses
from typing import Any

from vlm_jax.config import DecoderConfig
from vlm_jax.families.mpt import LAYER, MODEL, alibi_decoder
from vlm_jax.interop.hf_config import require
from vlm_jax.interop.published import register_language
from vlm_jax.interop.register import LanguageFamily
from vlm_jax.interop.rows import DOWN, FROM_HEADS, FUSED, UP, linear, norm, query_key_value
from vlm_jax.interop.table import Table, row


@dataclasses.dataclass(frozen=True)
class MosaicGptConfig:
    """The settings of the hub's configuration that change what is computed, with its defaults."""

    d_model: int = 2048
    n_heads: int = 16
    n_layers: int = 24
    mlp_ratio: int = 4
    max_seq_len: int = 2048
    vocab_size: int = 50368
    attn_qk_ln: bool = False
    attn_clip_qkv: float | None = None
    softmax_scale: float | None = None
    prefix_lm: bool = False
    alibi: bool = False
    alibi_bias_max: float = 8
    logit_scale: float | str | None = None
    no_bias: bool = False


def table(config: DecoderConfig) -> Table:
    """Published names <-> the paths of a `Decoder`."""
    attention = "layers/attention"
    norms = [("ln_1", "layers/attention_norm"), ("ln_2", "layers/mlp_norm")]
    if config.block.qk_norm:
        norms += [("attn.q_ln", f"{attention}/query_norm"), ("attn.k_ln", f"{attention}/key_norm")]
    rows = (
        row(f"{MODEL}wte.weight", "embedding", "V D -> V D"),
        *linear(f"{LAYER}attn.Wqkv", query_key_value(attention), FUSED, bias=False),
        *linear(f"{LAYER}attn.out_proj", f"{attention}/out", FROM_HEADS, bias=False),
        *linear(f"{LAYER}mlp.mlp_up", "layers/mlp/up", UP, bias=False),
        *linear(f"{LAYER}mlp.mlp_down", "layers/mlp/down", DOWN, bias=False),
        *(r for name, ours in norms for r in norm(f"{LAYER}{name}", ours, bias=False)),
        *norm(f"{MODEL}ln_f", "final_norm", bias=False),
    )
    return Table(rows)


def config_from_hf(config: Any) -> DecoderConfig:
    """`MosaicGPTConfig`, as `config.json` says it -> ours.

    Raises:
      ValueError: an unsupported setting, or a number of heads whose ALiBi slopes differ between versions of the hub's code.
    """
    known = {field.name for field in dataclasses.fields(MosaicGptConfig)}
    said = MosaicGptConfig(**{name: value for name, value in vars(config).items() if name in known})
    require(said, alibi=True, no_bias=True, attn_clip_qkv=None, softmax_scale=None, prefix_lm=False, logit_scale=None)
    heads = said.n_heads
    if heads < 1 or heads & (heads - 1) or said.d_model % heads:
        raise ValueError(
            f"MosaicGptConfig: n_heads={heads}, d_model={said.d_model}; only a power of two that divides d_model is implemented"
        )
    return alibi_decoder(
        said,
        alibi_bias_max=said.alibi_bias_max,
        mlp_ratio=said.mlp_ratio,
        eps=1e-5,
        qk_norm=said.attn_qk_ln,
        tied_head=True,
    )


register_language("mosaic_gpt", part=LanguageFamily(config_from_hf, table, prefix=MODEL))
