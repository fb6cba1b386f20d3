"""BERT (Devlin et al. 2019) as a text encoder: transformers' `BertModel`, and the sentence encoders that are one (Reimers &
Gurevych 2019): all-MiniLM-L6-v2 is its tokens' mean.

Every token has the first token type, as of a single text. The pooler, an output that sentence encoders do not use, is left out.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from vlm_jax.config import DecoderConfig, LearnedPositionsConfig, TextTowerConfig
from vlm_jax.interop.hf_config import plain_block, require
from vlm_jax.interop.published import text_tower_family
from vlm_jax.interop.register import FAMILIES
from vlm_jax.interop.rows import DOWN, FROM_HEADS, TO_HEADS, UP, linear, norm, query_key_value
from vlm_jax.interop.table import Table, row

LAYER = "encoder.layer.{}."


def table(config: DecoderConfig) -> Table:
    """Names of `BertModel`, or with "bert." in front those of a model with a head <-> the paths of a `Decoder`."""
    names = zip(("query", "key", "value"), query_key_value("layers/attention"), strict=True)
    entries = (
        row("embeddings.word_embeddings.weight", "embedding", "V D -> V D"),
        row("embeddings.position_embeddings.weight", "position_embedding", "T D -> T D"),
        row("embeddings.token_type_embeddings.weight", "type_embedding", "T D -> T D"),
        *norm("embeddings.LayerNorm", "embedding_norm"),
        *(r for name, ours in names for r in linear(f"{LAYER}attention.self.{name}", ours, TO_HEADS)),
        *linear(f"{LAYER}attention.output.dense", "layers/attention/out", FROM_HEADS),
        *norm(f"{LAYER}attention.output.LayerNorm", "layers/attention_norm"),
        *linear(f"{LAYER}intermediate.dense", "layers/mlp/up", UP),
        *linear(f"{LAYER}output.dense", "layers/mlp/down", DOWN),
        *norm(f"{LAYER}output.LayerNorm", "layers/mlp_norm"),
    )
    return Table(entries, ignored=("embeddings.position_ids", "pooler.dense.weight", "pooler.dense.bias")).under("[bert.]")


def config_from_hf(config: Any) -> TextTowerConfig:
    """`BertConfig` -> ours.

    Raises:
      ValueError: positions of another kind than learned ones, or a decoder.
    """
    require(config, position_embedding_type="absolute", is_decoder=False, add_cross_attention=False)
    encoder = DecoderConfig(
        vocab_size=config.vocab_size,
        layers=config.num_hidden_layers,
        block=dataclasses.replace(plain_block(config), post_norm=True),
        positions=LearnedPositionsConfig(),
        max_positions=config.max_position_embeddings,
        window=None,
        tied_head=True,
        final_norm=False,
        embedding_norm=True,
        token_types=config.type_vocab_size,
    )
    return TextTowerConfig(
        encoder=encoder, causal=False, pool="mean", pad_token=config.pad_token_id, projection=None, projection_bias=False
    )


FAMILIES.add("bert")(text_tower_family(config_from_hf, lambda config: table(config.encoder).under(ours="encoder/")))
