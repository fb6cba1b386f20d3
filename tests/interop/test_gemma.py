"""Gemma against transformers, logit by logit."""

import pytest
from torch_helpers import VOCAB, compare_language_model, random_sizes
from transformers import GemmaConfig, GemmaForCausalLM

from vlm_jax.families import gemma

SIZES = dict(
    vocab_size=VOCAB,
    hidden_size=32,
    intermediate_size=56,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=1,
    head_dim=12,
    max_position_embeddings=64,
)


@pytest.mark.parametrize("changes", [dict(), dict(num_key_value_heads=4, attention_bias=True)], ids=["mqa", "mha_biases"])
def test_gemma(changes):
    config = GemmaConfig(**SIZES | changes)
    ours = gemma.config_from_hf(config)
    assert ours.tied_head and ours.scale_embedding and ours.block.activation == "gelu_tanh"
    compare_language_model(GemmaForCausalLM(config), ours, gemma.table(ours))


@pytest.mark.parametrize("seed", range(3))
def test_random_sizes(seed):
    config = GemmaConfig(**random_sizes(seed + 40) | dict(tie_word_embeddings=True), hidden_act="gelu")
    ours = gemma.config_from_hf(config)
    assert ours.block.activation == "gelu_tanh"  # what old files mean by gelu
    compare_language_model(GemmaForCausalLM(config), ours, gemma.table(ours))


def test_bidirectional_attention_is_refused():
    with pytest.raises(ValueError, match="use_bidirectional_attention=True"):
        gemma.config_from_hf(GemmaConfig(**SIZES, use_bidirectional_attention=True))
