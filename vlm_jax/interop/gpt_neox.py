"""GPT-NeoX (Black et al. 2022), Pythia, and RedPajama, the language model of OpenFlamingo: `GPTNeoXForCausalLM`."""

from __future__ import annotations

from typing import Any

from vlm_jax.config import BlockConfig, DecoderConfig, NormConfig
from vlm_jax.interop.hf_config import activation, rope
from vlm_jax.interop.table import Copy, Table, row

MODEL = "gpt_neox."
LAYER = MODEL + "layers.{}."


def table(config: DecoderConfig) -> Table:
    """Published names <-> the paths of a `Decoder`."""
    maps = [
        (f"{LAYER}mlp.dense_h_to_4h", "up", "F D -> D F", "F -> F"),
        (f"{LAYER}mlp.dense_4h_to_h", "down", "D F -> F D", "D -> D"),
    ]
    norms = (
        (f"{LAYER}input_layernorm", "layers/attention_norm"),
        (f"{LAYER}post_attention_layernorm", "layers/mlp_norm"),
        (f"{MODEL}final_layer_norm", "final_norm"),
    )
    fused = lambda kind: tuple(f"layers/attention/{name}/{kind}" for name in ("query", "key", "value"))
    rows = [
        row(f"{MODEL}embed_in.weight", "embedding", "V D -> V D"),
        row(f"{LAYER}attention.query_key_value.weight", fused("kernel"), "(N J H) D -> D N H"),
        row(f"{LAYER}attention.dense.weight", "layers/attention/out/kernel", "D (N H) -> N H D"),
        *(row(f"{name}.weight", f"layers/mlp/{ours}/kernel", axes) for name, ours, axes, _ in maps),
        *(row(f"{name}.bias", f"layers/mlp/{ours}/bias", axes) for name, ours, _, axes in maps),
        *(row(f"{name}.weight", f"{ours}/scale", "D -> D") for name, ours in norms),
        *(row(f"{name}.bias", f"{ours}/bias", "D -> D") for name, ours in norms),
    ]
    if config.block.qkv_bias:
        rows += [
            row(f"{LAYER}attention.query_key_value.bias", fused("bias"), "(N J H) -> N H"),
            row(f"{LAYER}attention.dense.bias", "layers/attention/out/bias", "D -> D"),
        ]
    copies = (Copy("embed_out.weight", of=f"{MODEL}embed_in.weight"),)
    if not config.tied_head:
        rows.append(row("embed_out.weight", "lm_head/kernel", "V D -> D V"))
        copies = ()
    buffers = ("bias", "masked_bias", "rotary_emb.inv_freq")
    return Table(tuple(rows), copies, ignored=tuple(f"{LAYER}attention.{name}" for name in buffers))


def config_from_hf(config: Any) -> DecoderConfig:
    """`GPTNeoXConfig` -> ours."""
    block = BlockConfig(
        width=config.hidden_size,
        heads=config.num_attention_heads,
        kv_heads=config.num_attention_heads,
        head_width=config.hidden_size // config.num_attention_heads,
        mlp_width=config.intermediate_size,
        activation=activation(config.hidden_act),
        gated_mlp=False,
        norm=NormConfig(kind="layer", eps=config.layer_norm_eps),
        qkv_bias=config.attention_bias,
        out_bias=config.attention_bias,
        mlp_bias=True,
        parallel_residual=config.use_parallel_residual,
    )
    return DecoderConfig(
        vocab_size=config.vocab_size,
        layers=config.num_hidden_layers,
        block=block,
        positions=rope(config),
        max_positions=config.max_position_embeddings,
        window=None,
        tied_head=config.tie_word_embeddings,
    )
