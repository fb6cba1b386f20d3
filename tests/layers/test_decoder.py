import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.tiny import random_params, tiny_model
from vlm_jax.config import LearnedPositionsConfig
from vlm_jax.layers.decoder import Decoder
from vlm_jax.layers.stack import InterleavedLayers, LanguageInputs

TOKENS = np.array([[5, 9, 5]])
POSITIONS = np.array([[0, 1, 4]])


@functools.cache
def decoder(**changes):
    """A language model from tokens to logits, and random parameters."""
    language = dataclasses.replace(tiny_model().language, **changes)
    module = Decoder(language, jnp.float32)
    x = np.zeros((1, 3, language.block.width), np.float32)
    return module, random_params(module, LanguageInputs(x), POSITIONS, np.ones_like(POSITIONS))


def test_learned_positions_start_at_the_offset():
    module, params = decoder(positions=LearnedPositionsConfig(offset=2), max_positions=6)
    x = module.apply({"params": params}, TOKENS, method="embed")
    seen = InterleavedLayers(every=1, offset=0, layers=np.zeros(3), apply=lambda x, _: (x, x))
    inputs = LanguageInputs(x, interleaved=seen)
    out = module.apply({"params": params}, inputs, POSITIONS, np.ones_like(POSITIONS))
    assert params["position_embedding"].shape[0] == 8
    expected = params["embedding"][TOKENS] + params["position_embedding"][POSITIONS + 2]
    np.testing.assert_allclose(out.interleaved[0], expected, atol=1e-6)


def test_learned_positions_have_a_number():
    with pytest.raises(ValueError, match="max_positions=None: learned positions need their number"):
        decoder(positions=LearnedPositionsConfig(), max_positions=None)


@pytest.mark.parametrize("scale", [False, True])
def test_embeddings_are_scaled_for_gemma_alone(scale):
    module, params = decoder(scale_embedding=scale)
    x = module.apply({"params": params}, TOKENS, method="embed")
    np.testing.assert_allclose(x, params["embedding"][TOKENS] * (32**0.5 if scale else 1), rtol=1e-6)


def test_a_tied_head_is_the_embedding():
    module, params = decoder()
    hidden = np.random.default_rng(0).standard_normal((1, 3, 32)).astype(np.float32)
    logits = module.apply({"params": params}, hidden, method="head")
    assert logits.dtype == jnp.float32
    np.testing.assert_allclose(logits, hidden @ params["embedding"].T, atol=1e-4)
    assert "lm_head" not in params


def test_a_token_does_not_change_what_came_before():
    module, params = decoder()
    x = np.random.default_rng(0).standard_normal((1, 3, 32)).astype(np.float32)
    run = jax.jit(lambda x: module.apply({"params": params}, LanguageInputs(x), POSITIONS, np.ones_like(POSITIONS))[0])
    moved = np.any(run(x + np.array([0, 1, 0])[:, None]) != run(x), axis=-1)
    np.testing.assert_array_equal(moved[0], [False, True, True])
