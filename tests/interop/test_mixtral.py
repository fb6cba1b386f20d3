"""Mixtral against transformers, hidden state by hidden state."""

import pytest
from torch_helpers import (
    TOKENS,
    VOCAB,
    compare,
    compare_language_model,
    decoded,
    decoded_by_torch,
    language_params,
    random_sizes,
    random_tokens,
)
from transformers import MixtralConfig, MixtralForCausalLM

from vlm_jax.families import mixtral

SIZES = dict(
    vocab_size=VOCAB,
    hidden_size=24,
    intermediate_size=20,
    num_hidden_layers=3,
    num_attention_heads=3,
    num_key_value_heads=1,
    num_local_experts=4,
    max_position_embeddings=64,
)


def mixtral_of(config: MixtralConfig) -> MixtralForCausalLM:
    # torch's grouped product, the default, takes only some widths.
    return MixtralForCausalLM._from_config(config, experts_implementation="eager")


@pytest.mark.parametrize(
    "changes",
    [
        dict(),
        dict(num_local_experts=5, num_experts_per_tok=3, head_dim=10, tie_word_embeddings=True),
        dict(num_experts_per_tok=1, sliding_window=TOKENS // 3, num_key_value_heads=3),
        dict(num_local_experts=2, num_experts_per_tok=2),
    ],
    ids=["two_of_four", "three_of_five", "one_of_four", "all"],
)
def test_mixtral(changes):
    config = MixtralConfig(**SIZES | changes)
    ours = mixtral.config_from_hf(config)
    compare_language_model(mixtral_of(config), ours, mixtral.table(ours))


@pytest.mark.parametrize("seed", range(3))
def test_random_sizes(seed):
    config = MixtralConfig(**random_sizes(seed + 30), num_local_experts=seed + 3, num_experts_per_tok=2)
    ours = mixtral.config_from_hf(config)
    compare_language_model(mixtral_of(config), ours, mixtral.table(ours))


def test_decoding():
    config = MixtralConfig(**SIZES)
    oracle, ours, tokens = mixtral_of(config), mixtral.config_from_hf(config), random_tokens()
    params = language_params(oracle, ours, mixtral.table(ours))
    compare(decoded(params, ours, tokens, 7), decoded_by_torch(oracle, tokens, 7))
