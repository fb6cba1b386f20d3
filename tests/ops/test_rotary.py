import math

import jax
import numpy as np
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from vlm_jax.config import LinearScaling, Llama3Scaling, RopeConfig, YarnScaling
from vlm_jax.ops.rotary import inverse_frequencies, rotary_angles, rotate

LLAMA_3_1 = RopeConfig(
    base=500_000.0,
    scaling=Llama3Scaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_positions=8192),
)


def turned(x, positions, config=LLAMA_3_1):
    return jax.jit(lambda x, p: rotate(x, *rotary_angles(config, x.shape[-1], p)))(x, positions)


def test_pairs_of_the_two_halves_are_turned():
    config = RopeConfig(base=100.0, scaling=None)  # frequencies 1 and 0.1 at head width 4
    x = np.array([1, 2, 3, 4], np.float32).reshape(1, 1, 1, 4)
    y = np.asarray(turned(x, np.array([[2]]), config)).ravel()
    one, two = complex(1, 3) * np.exp(2j), complex(2, 4) * np.exp(0.2j)
    np.testing.assert_allclose(y, [one.real, two.real, one.imag, two.imag], rtol=1e-6)


def test_products_depend_on_the_distance_alone():
    rng = np.random.default_rng(0)
    q, k = rng.standard_normal((2, 1, 6, 3, 16)).astype(np.float32)
    product = lambda start: np.einsum(
        "BTNH,BSNH->BNTS", *(turned(x, start + np.arange(6)[None] * step) for x, step in ((q, 1), (k, 2)))
    )
    np.testing.assert_allclose(product(0), product(50), atol=1e-4)
    assert np.abs(product(0) - np.einsum("BTNH,BSNH->BNTS", q, k)).max() > 0.1


def test_frequencies_are_those_of_transformers():
    plain = {"rope_type": "default", "rope_theta": 500_000.0}
    llama3 = {
        "rope_type": "llama3",
        "rope_theta": 500_000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    theirs = LlamaConfig(hidden_size=256, num_attention_heads=2, rope_parameters=plain | llama3)
    expected = ROPE_INIT_FUNCTIONS["llama3"](theirs, "cpu")[0].numpy()
    np.testing.assert_allclose(inverse_frequencies(LLAMA_3_1, 128), expected, rtol=2e-7)
    linear = LlamaConfig(hidden_size=256, num_attention_heads=2, rope_parameters=plain | {"rope_type": "linear", "factor": 4.0})
    expected = ROPE_INIT_FUNCTIONS["linear"](linear, "cpu")[0].numpy()
    ours = inverse_frequencies(RopeConfig(base=500_000.0, scaling=LinearScaling(factor=4.0)), 128)
    np.testing.assert_allclose(ours, expected, rtol=2e-7)
    # Qwen2.5's, on half of the head.
    yarn = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 32_768}
    half = {"partial_rotary_factor": 0.5}
    theirs = LlamaConfig(hidden_size=256, num_attention_heads=1, max_position_embeddings=131_072, rope_parameters=yarn | half)
    expected = ROPE_INIT_FUNCTIONS["yarn"](theirs, "cpu")[0].numpy()
    scaling = YarnScaling(factor=4.0, original_max_positions=32_768, attention_factor=1.0)
    np.testing.assert_allclose(inverse_frequencies(RopeConfig(base=1e6, scaling=scaling, share=0.5), 256), expected, rtol=3e-7)


def test_llama3_scaling_by_hand():
    plain = [500_000.0 ** (-2 * i / 128) for i in range(64)]
    expected = []
    for frequency in plain:
        turns = 8192 * frequency / (2 * math.pi)  # over the original context
        if turns < 1:
            expected.append(frequency / 8)
        elif turns > 4:
            expected.append(frequency)
        else:
            share = (turns - 1) / 3
            expected.append((1 - share) * frequency / 8 + share * frequency)
    between = sum(1 for new, old in zip(expected, plain, strict=True) if old / 8 < new < old)
    assert between >= 3
    np.testing.assert_allclose(inverse_frequencies(LLAMA_3_1, 128), expected, rtol=1e-5)
