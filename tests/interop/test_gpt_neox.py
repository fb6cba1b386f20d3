"""GPT-NeoX against transformers, hidden state by hidden state."""

import numpy as np
import pytest
from torch_helpers import VOCAB, compare_language_model, random_sizes, randomised, saved_state
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from vlm_jax.config import ModelConfig
from vlm_jax.families import gpt_neox
from vlm_jax.interop.engine import abstract_params, to_ours
from vlm_jax.models.vlm import VisionLanguageModel

SIZES = dict(
    vocab_size=VOCAB,
    hidden_size=48,
    intermediate_size=56,
    num_hidden_layers=3,
    num_attention_heads=3,
    max_position_embeddings=64,
)


def rope(share: float, **values) -> dict:
    return dict(rope_type="default", rope_theta=100.0, partial_rotary_factor=share) | values


@pytest.mark.parametrize(
    ("changes", "turned"),
    [
        (dict(), 4),
        (dict(use_parallel_residual=False, rope_parameters=rope(1.0)), 16),
        (dict(num_attention_heads=4, attention_bias=False, rope_parameters=rope(0.5), hidden_act="gelu_fast"), 6),
        (dict(tie_word_embeddings=True, rope_parameters=rope(0.5, rope_type="linear", factor=2.0)), 8),
    ],
    ids=["pythia", "redpajama", "no_attention_bias", "tied"],
)
def test_gpt_neox(changes, turned):
    config = GPTNeoXConfig(**SIZES | changes)
    ours = gpt_neox.config_from_hf(config)
    assert int(ours.block.head_width * ours.positions.share) == turned
    compare_language_model(GPTNeoXForCausalLM(config), ours, gpt_neox.table(ours))


@pytest.mark.parametrize("seed", range(3))
def test_random_sizes(seed):
    sizes = random_sizes(seed + 20)
    width = 8 * sizes["num_attention_heads"]
    names = ("vocab_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "tie_word_embeddings")
    config = GPTNeoXConfig(
        **{name: sizes[name] for name in names},
        hidden_size=width,
        max_position_embeddings=64,
        use_parallel_residual=bool(seed % 2),
        rope_parameters=rope((0.25, 0.5, 1.0)[seed]),
    )
    ours = gpt_neox.config_from_hf(config)
    compare_language_model(GPTNeoXForCausalLM(config), ours, gpt_neox.table(ours))


def test_old_files_name_the_rotary_share_and_hold_buffers():
    config = GPTNeoXConfig.from_dict(SIZES | dict(model_type="gpt_neox", rotary_pct=0.75, rotary_emb_base=20_000))
    ours = gpt_neox.config_from_hf(config)
    assert (ours.positions.share, ours.positions.base) == (0.75, 20_000.0)
    state = saved_state(randomised(GPTNeoXForCausalLM(config)))
    for name in ("bias", "masked_bias", "rotary_emb.inv_freq"):
        state[f"gpt_neox.layers.1.attention.{name}"] = np.zeros(3, np.float32)
    model = VisionLanguageModel(ModelConfig(vision=None, connector=None, fusion=None, language=ours))
    to_ours(state, gpt_neox.table(ours).under(ours="language/"), abstract_params(model))
