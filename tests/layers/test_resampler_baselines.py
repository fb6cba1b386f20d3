"""What the Perceiver resampler is compared with: which features each visual token may depend on."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.tiny import random_params
from vlm_jax.config import ResidualMlpConfig, TransformerResamplerConfig
from vlm_jax.layers.resampler_baselines import ResidualMlp, TransformerResampler

B, M, I, P, D = 2, 2, 3, 5, 16  # noqa: E741
FEATURES = np.random.default_rng(0).standard_normal((B, M, I, P, D)).astype(np.float32)
FRAMES = np.array([[3, 1], [2, 0]], np.int32)


@functools.cache
def module(kind, times=0):
    if kind == "transformer":
        config = TransformerResamplerConfig(latents=4, layers=2, heads=2, head_width=8, time_embeddings=times)
        made = TransformerResampler(config, D, jnp.float32)
    else:
        made = ResidualMlp(ResidualMlpConfig(layers=2, time_embeddings=times), D, jnp.float32)
    params = jax.tree.map(jnp.asarray, random_params(made, FEATURES, FRAMES))
    return jax.jit(lambda features, mask=None: made.apply({"params": params}, features, FRAMES, mask=mask)[0])


@pytest.mark.parametrize("kind", ["transformer", "mlp"])
def test_what_is_not_there_is_not_seen(kind):
    run, there = module(kind), np.arange(I) < FRAMES[..., None]
    expected = run(FEATURES)
    assert expected.shape == (B, M, 4 if kind == "transformer" else I * P, D)
    np.testing.assert_array_equal(run(np.where(there[..., None, None], FEATURES, 1e3)), expected)
    assert np.abs(run(np.where(there[..., None, None], 2 * FEATURES, FEATURES)) - expected)[FRAMES > 0].max() > 1e-2
    mask = np.ones((B, M, I, P), bool)
    mask[0, 0, 0, 0] = False
    changed = FEATURES.copy()
    changed[0, 0, 0, 0] = 1e3
    np.testing.assert_array_equal(run(changed, mask), run(FEATURES, mask))
    assert np.abs(run(FEATURES, mask) - expected).max() > 1e-3


def test_an_mlp_makes_each_token_of_its_own_feature():
    run = module("mlp")
    changed = FEATURES.copy()
    changed[0, 0, 1, 2] += 1
    moved = np.any(run(changed) != run(FEATURES), axis=-1)
    assert moved[0, 0].tolist() == [place == P + 2 for place in range(I * P)] and not moved[1].any()
    assert not np.asarray(run(FEATURES))[1, 1].any(), "no frame is there"


def test_latents_of_a_transformer_look_at_all_features_in_any_order():
    """But for the time of their frames, which a learned embedding tells."""
    order = np.random.default_rng(1).permutation(P)
    run, timed = module("transformer"), module("transformer", 3)
    np.testing.assert_allclose(run(FEATURES[:, :, :, order]), run(FEATURES), atol=1e-4)
    swapped = FEATURES[:, :, [1, 0, 2]]
    np.testing.assert_allclose(run(swapped)[0, 0], run(FEATURES)[0, 0], atol=1e-4)
    assert np.abs(timed(swapped) - timed(FEATURES))[0, 0].max() > 1e-3
