"""LLaMA and Mistral against transformers, logit by logit."""

import pytest
from torch_helpers import TOKENS, VOCAB, compare_language_model, random_sizes
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from vlm_jax.families import llama

SIZES = dict(
    vocab_size=VOCAB,
    hidden_size=32,
    intermediate_size=56,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
)
LLAMA3 = dict(
    rope_type="llama3",
    rope_theta=100.0,
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=32,
)


@pytest.mark.parametrize(
    "changes",
    [
        dict(),
        dict(tie_word_embeddings=True, num_key_value_heads=1),
        dict(rope_parameters=dict(rope_type="linear", factor=3.0, rope_theta=10_000.0)),
        dict(rope_parameters=LLAMA3, head_dim=12),
        dict(attention_bias=True, mlp_bias=True, rms_norm_eps=0.1, pretraining_tp=2),
    ],
    ids=["gqa", "tied", "linear", "llama3", "biases"],
)
def test_llama(changes):
    config = LlamaConfig(**SIZES | changes)
    ours = llama.config_from_hf(config)
    compare_language_model(LlamaForCausalLM(config), ours, llama.table(ours))


def test_mistral_sees_only_its_window():
    config = MistralConfig(**SIZES, sliding_window=TOKENS // 3, head_dim=8)
    ours = llama.config_from_hf(config)
    assert ours.window == TOKENS // 3
    compare_language_model(MistralForCausalLM(config), ours, llama.table(ours))


@pytest.mark.parametrize("seed", range(3))
def test_random_sizes(seed):
    config = LlamaConfig(**random_sizes(seed), rope_parameters=dict(rope_type="default", rope_theta=50.0))
    ours = llama.config_from_hf(config)
    compare_language_model(LlamaForCausalLM(config), ours, llama.table(ours))


def test_heads_turned_in_part_are_refused():
    rope = dict(rope_type="default", rope_theta=1e4, partial_rotary_factor=0.5)
    with pytest.raises(ValueError, match=r"partial_rotary_factor=0.5; this model rotates whole heads"):
        llama.config_from_hf(LlamaConfig(**SIZES, rope_parameters=rope))
