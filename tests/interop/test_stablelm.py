"""StableLM against transformers, hidden state by hidden state."""

import pytest
from torch_helpers import VOCAB, compare_language_model
from transformers import StableLmConfig, StableLmForCausalLM

from vlm_jax.families import stablelm

SIZES = dict(
    vocab_size=VOCAB,
    hidden_size=48,
    intermediate_size=56,
    num_hidden_layers=3,
    num_attention_heads=3,
    num_key_value_heads=3,
    max_position_embeddings=64,
)


@pytest.mark.parametrize(
    "changes",
    [
        dict(),
        dict(use_qkv_bias=True, num_attention_heads=6, num_key_value_heads=2, layer_norm_eps=0.1),
        dict(use_parallel_residual=True),
        dict(tie_word_embeddings=True),
    ],
    ids=["3b", "grouped", "parallel", "tied"],
)
def test_stablelm(changes):
    config = StableLmConfig(**SIZES | changes)
    ours = stablelm.config_from_hf(config)
    assert ours.positions.share == 0.25
    compare_language_model(StableLmForCausalLM(config), ours, stablelm.table(ours))


def test_normalised_queries_are_refused():
    with pytest.raises(ValueError, match=r"qk_layernorm=True \(only False is implemented\)"):
        stablelm.config_from_hf(StableLmConfig(**SIZES, qk_layernorm=True))
