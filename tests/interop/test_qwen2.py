"""Qwen2 against transformers, hidden state by hidden state."""

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
from transformers import Qwen2Config, Qwen2ForCausalLM

from vlm_jax.families import qwen2

SIZES = dict(
    vocab_size=VOCAB,
    hidden_size=30,
    intermediate_size=44,
    num_hidden_layers=4,
    num_attention_heads=5,
    num_key_value_heads=1,
    max_position_embeddings=64,
)
WINDOW = dict(use_sliding_window=True, sliding_window=TOKENS // 4)


@pytest.mark.parametrize(
    ("changes", "window"),
    [
        (dict(), None),
        (dict(tie_word_embeddings=True, num_key_value_heads=5, sliding_window=3), None),
        (WINDOW | dict(max_window_layers=0), 3),
        (WINDOW | dict(max_window_layers=2), (None, None, 3, 3)),
        (WINDOW | dict(layer_types=["sliding_attention", "full_attention"] * 2), (3, None, 3, None)),
    ],
    ids=["five_heads", "tied", "window", "last_layers", "layer_types"],
)
def test_qwen2(changes, window):
    config = Qwen2Config(**SIZES | changes)
    ours = qwen2.config_from_hf(config)
    assert ours.window == window
    compare_language_model(Qwen2ForCausalLM(config), ours, qwen2.table(ours))


@pytest.mark.parametrize("seed", range(3))
def test_random_sizes(seed):
    sizes = random_sizes(seed + 10) | WINDOW | dict(max_window_layers=1)
    config = Qwen2Config(**sizes)
    ours = qwen2.config_from_hf(config)
    compare_language_model(Qwen2ForCausalLM(config), ours, qwen2.table(ours))


def test_decoding_with_windows_of_the_layers():
    config = Qwen2Config(**SIZES, **WINDOW, max_window_layers=2)
    oracle, ours, tokens = Qwen2ForCausalLM(config), qwen2.config_from_hf(config), random_tokens()
    params = language_params(oracle, ours, qwen2.table(ours))
    compare(decoded(params, ours, tokens, 6), decoded_by_torch(oracle, tokens, 6))


def test_another_type_of_layer_is_refused():
    config = Qwen2Config(**SIZES)
    config.layer_types = ["chunked_attention"] * 4
    with pytest.raises(ValueError, match=r"layer_types \['chunked_attention'\]"):
        qwen2.config_from_hf(config)
