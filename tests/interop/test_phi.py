"""Phi against transformers, hidden state by hidden state."""

import pytest
from torch_helpers import VOCAB, compare_language_model
from transformers import PhiConfig, PhiForCausalLM

from vlm_jax.families import phi

SIZES = dict(
    vocab_size=VOCAB,
    hidden_size=48,
    intermediate_size=56,
    num_hidden_layers=3,
    num_attention_heads=4,
    max_position_embeddings=64,
)


@pytest.mark.parametrize(
    "changes", [dict(), dict(num_attention_heads=6, num_key_value_heads=2, hidden_act="gelu", layer_norm_eps=0.1)]
)
def test_phi(changes):
    config = PhiConfig(**SIZES | changes)
    ours = phi.config_from_hf(config)
    compare_language_model(PhiForCausalLM(config), ours, phi.table(ours))


def test_normalised_queries_are_refused():
    with pytest.raises(ValueError, match=r"qk_layernorm=True \(only False is implemented\)"):
        phi.config_from_hf(PhiConfig(**SIZES, qk_layernorm=True))
