"""Mixtral (Jiang et al. 2024): `MixtralForCausalLM`, in the layout of the hub and of `save_pretrained`."""

from __future__ import annotations

import dataclasses
from typing import Any

from vlm_jax.config import DecoderConfig, ExpertsConfig
from vlm_jax.families import llama
from vlm_jax.interop.published import register_language
from vlm_jax.interop.register import LanguageFamily
from vlm_jax.interop.table import Table, row

MOE = llama.LAYER + "block_sparse_moe."


def table(config: DecoderConfig) -> Table:
    """Published names <-> the paths of a `Decoder`."""
    rows = (
        row(f"{MOE}gate.weight", "layers/mlp/router/kernel", "E D -> D E"),
        row(f"{MOE}experts.{{}}.w1.weight", "layers/mlp/experts/gate", "F D -> D F"),
        row(f"{MOE}experts.{{}}.w2.weight", "layers/mlp/experts/down", "D F -> F D"),
        row(f"{MOE}experts.{{}}.w3.weight", "layers/mlp/experts/up", "F D -> D F"),
    )
    return llama.attention(config) + llama.head(config) + Table(rows)


def config_from_hf(config: Any) -> DecoderConfig:
    """`MixtralConfig` -> ours."""
    ours = llama.config_from_hf(config)
    experts = ExpertsConfig(number=config.num_local_experts, chosen=config.num_experts_per_tok)
    return dataclasses.replace(ours, block=dataclasses.replace(ours.block, experts=experts))


register_language("mixtral", part=LanguageFamily(config_from_hf, table))
