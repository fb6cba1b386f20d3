"""StableLM (Bellagente et al. 2024), a language model of MoE-LLaVA: `StableLmForCausalLM`. LLaMA's names, and layer norms."""

from __future__ import annotations

from typing import Any

from vlm_jax.config import DecoderConfig
from vlm_jax.families import llama
from vlm_jax.interop.hf_config import plain_block, plain_decoder, require, rope
from vlm_jax.interop.published import register_language
from vlm_jax.interop.register import LanguageFamily
from vlm_jax.interop.rows import norm
from vlm_jax.interop.table import Table


def table(config: DecoderConfig) -> Table:
    """Published names <-> the paths of a `Decoder`."""
    own = llama.table(config)
    norms = ("final_norm/scale", "layers/attention_norm/scale", "layers/mlp_norm/scale")
    rows = tuple(one for one in own.rows if one.ours[0] not in norms)
    rows += norm("model.norm", "final_norm") + norm(f"{llama.LAYER}input_layernorm", "layers/attention_norm")
    if not config.block.shared_norm:
        rows += norm(f"{llama.LAYER}post_attention_layernorm", "layers/mlp_norm")
    return Table(rows, own.copies, own.ignored)


def config_from_hf(config: Any) -> DecoderConfig:
    """`StableLmConfig` -> ours; not those that normalise queries and keys, each head by itself (StableLM-2-12B)."""
    require(config, qk_layernorm=False)
    parallel = config.use_parallel_residual
    block = plain_block(
        config,
        kv_heads=config.num_key_value_heads,
        gated_mlp=True,
        qkv_bias=config.use_qkv_bias,
        out_bias=False,
        mlp_bias=False,
        parallel_residual=parallel,
        shared_norm=parallel,
    )
    return plain_decoder(config, block, rope(config))


register_language("stablelm", part=LanguageFamily(config_from_hf, table))
