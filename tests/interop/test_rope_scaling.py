"""Every RoPE scaling against transformers, on sequences that are longer than the original maximum."""

import jax
import numpy as np
import pytest
import torch
from torch_helpers import (
    TOKENS,
    VOCAB,
    compare,
    compare_language_model,
    decoded,
    decoded_by_torch,
    language_params,
    random_tokens,
    randomised,
    text_batch,
)
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, LlamaConfig, LlamaForCausalLM

from vlm_jax.config import DynamicNtkScaling, LongRopeScaling, ModelConfig, RopeConfig, YarnScaling
from vlm_jax.families import gpt_neox, llama
from vlm_jax.models.vlm import VisionLanguageModel
from vlm_jax.ops.rotary import rotary_angles

ORIGINAL = 7
SIZES = dict(
    vocab_size=VOCAB, hidden_size=32, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1
)
SHORT, LONG = [1.0, 1.1, 1.2, 1.4, 1.5, 1.7, 2.0, 2.5], [1.0, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 6.0]


def scaled(kind: str, **values) -> LlamaConfig:
    rope = dict(rope_type=kind, rope_theta=20.0) | values
    # What transformers takes for the original maximum of dynamic NTK is that of the model.
    longest = ORIGINAL if kind == "dynamic" else 4 * ORIGINAL
    return LlamaConfig(**SIZES, max_position_embeddings=longest, rope_parameters=rope)


YARN = dict(factor=4.0, original_max_position_embeddings=ORIGINAL)
LONGROPE = dict(short_factor=SHORT, long_factor=LONG, original_max_position_embeddings=ORIGINAL)
SCALED = {
    "dynamic": scaled("dynamic", factor=3.0),
    "yarn": scaled("yarn", **YARN),
    "yarn_all": scaled("yarn", **YARN, beta_fast=3.0, beta_slow=0.3, truncate=False, mscale=2.0, mscale_all_dim=0.5),
    "yarn_factor": scaled("yarn", **YARN | dict(factor=None), attention_factor=0.7, beta_fast=2, beta_slow=0.1),
    "longrope": scaled("longrope", **LONGROPE),
    "longrope_factor": scaled("longrope", **LONGROPE, factor=9.0),
}


@pytest.mark.parametrize("name", SCALED)
def test_a_long_prompt(name):
    config = SCALED[name]
    ours = llama.config_from_hf(config)
    compare_language_model(LlamaForCausalLM(config), ours, llama.table(ours))


@pytest.mark.parametrize("name", ["dynamic", "yarn", "longrope"])
def test_decoding_across_the_original_maximum(name):
    config, tokens = SCALED[name], random_tokens()
    oracle, ours = LlamaForCausalLM(config), llama.config_from_hf(config)
    params = language_params(oracle, ours, llama.table(ours))
    logits = decoded(params, ours, tokens, 4)
    compare(logits, decoded_by_torch(oracle, tokens, 4))
    if name != "yarn":
        # Keys stay as they were turned: one whole pass turns them otherwise.
        with torch.no_grad():
            whole = oracle(input_ids=torch.tensor(tokens)).logits.numpy()
        assert np.abs(whole - logits)[:, ORIGINAL + 1 :].max() > 1e-2


@pytest.mark.parametrize("name", ["dynamic", "longrope"])
def test_packed_and_left_padded_sequences_are_turned_as_if_alone(name):
    """Sequences of 5 and 12 tokens in a row, and three tokens of padding in front: transformers on each of them alone."""
    config, tokens = SCALED[name], random_tokens()
    ours = llama.config_from_hf(config)
    model = VisionLanguageModel(ModelConfig(vision=None, connector=None, fusion=None, language=ours))
    oracle = randomised(LlamaForCausalLM(config))
    params = {"language": language_params(oracle, ours, llama.table(ours))}
    short, long = tokens[:1, :5], tokens[1:]
    packed = text_batch(
        np.concatenate([np.zeros((1, 3), np.int32), short, long], axis=1),
        positions=np.array([[0] * 3 + [*range(5), *range(TOKENS)]], np.int32),
        segments=np.array([[0] * 3 + [1] * 5 + [2] * TOKENS], np.int32),
    )
    logits = jax.jit(model.apply)({"params": params}, packed)
    for part, alone in ((logits[:, 3:8], short), (logits[:, 8:], long)):
        with torch.no_grad():
            # A model of its own for each: dynamic NTK remembers in transformers.
            compare(part, randomised(LlamaForCausalLM(config))(input_ids=torch.tensor(alone)).logits)


def test_dynamic_ntk_keeps_nothing_of_an_earlier_call():
    """A model of transformers that has read a longer sequence turns a shorter one by that; a new one does not."""
    config, tokens = SCALED["dynamic"], random_tokens()
    ours = llama.config_from_hf(config)
    oracle = LlamaForCausalLM(config)
    params = language_params(oracle, ours, llama.table(ours))
    for length in (TOKENS, ORIGINAL + 2):
        logits = decoded(params, ours, tokens[:, :length], length)
        with torch.no_grad():
            compare(logits, randomised(LlamaForCausalLM(config))(input_ids=torch.tensor(tokens[:, :length])).logits)
            used = oracle(input_ids=torch.tensor(tokens[:, :length])).logits.numpy()
        assert (np.abs(used - logits).max() > 1e-2) == (length < TOKENS)


def test_dynamic_ntk_has_no_longest_sequence():
    assert llama.config_from_hf(SCALED["dynamic"]).max_positions is None
    assert llama.config_from_hf(SCALED["yarn"]).max_positions == 4 * ORIGINAL


def test_dynamic_ntk_of_a_part_of_the_head():
    rope = dict(rope_type="dynamic", factor=2.0, rope_theta=50.0, partial_rotary_factor=0.5)
    sizes = {name: value for name, value in SIZES.items() if name != "num_key_value_heads"}
    config = GPTNeoXConfig(**sizes, max_position_embeddings=ORIGINAL, rope_parameters=rope)
    ours = gpt_neox.config_from_hf(config)
    compare_language_model(GPTNeoXForCausalLM(config), ours, gpt_neox.table(ours))


def test_old_configs_say_rope_scaling():
    values = SIZES | dict(model_type="llama", max_position_embeddings=ORIGINAL, rope_theta=300.0)
    of = lambda **scaling: llama.config_from_hf(LlamaConfig.from_dict(values | dict(rope_scaling=scaling))).positions
    assert of(type="dynamic", factor=2.0) == RopeConfig(
        base=300.0, scaling=DynamicNtkScaling(factor=2, original_max_positions=7)
    )
    yarn = YarnScaling(factor=2.0, original_max_positions=5, attention_factor=0.1 * np.log(2.0) + 1)
    assert of(type="yarn", factor=2.0, original_max_position_embeddings=5) == RopeConfig(base=300.0, scaling=yarn)


def test_unknown_scalings_are_refused():
    config = LlamaConfig(**SIZES)
    config.rope_parameters = dict(rope_type="su", factor=2.0, rope_theta=1e4)
    with pytest.raises(ValueError, match=r"LlamaConfig: RoPE scaling 'su'; expected one of \['default', 'dynamic'"):
        llama.config_from_hf(config)
    config.rope_parameters = dict(full_attention=dict(rope_theta=1e4), sliding_attention=dict(rope_theta=1e6))
    with pytest.raises(ValueError, match=r"of its own for each of \['full_attention', 'sliding_attention'\]"):
        llama.config_from_hf(config)


def test_a_short_sequence_is_turned_as_without_dynamic_ntk():
    positions = np.arange(ORIGINAL)[None]
    plain = RopeConfig(base=1e4, scaling=None)
    dynamic = RopeConfig(base=1e4, scaling=DynamicNtkScaling(factor=8.0, original_max_positions=ORIGINAL))
    np.testing.assert_array_equal(rotary_angles(dynamic, 64, positions), rotary_angles(plain, 64, positions))
    assert np.abs(np.subtract(rotary_angles(dynamic, 64, positions + 1), rotary_angles(plain, 64, positions + 1))).max() > 0.1


def test_longrope_by_hand():
    scaling = LongRopeScaling(short_factors=(1.0, 2.0), long_factors=(4.0, 8.0), original_max_positions=4, attention_factor=2.0)
    config = RopeConfig(base=100.0, scaling=scaling)  # frequencies 1 and 0.1 at head width 4
    for last, factors in ((3, (1, 2)), (4, (4, 8))):
        cos, _ = rotary_angles(config, 4, np.array([[1, last]]))
        expected = 2 * np.cos(np.outer([1, last], [1 / factors[0], 0.1 / factors[1]]))
        np.testing.assert_allclose(cos[0, :, 0], expected, rtol=1e-6)
