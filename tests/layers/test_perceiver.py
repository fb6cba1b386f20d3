import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.tiny import random_params
from vlm_jax.config import PerceiverConfig
from vlm_jax.layers.perceiver import PerceiverResampler

PLAIN = PerceiverConfig(latents=4, layers=2, heads=2, head_width=4)
TIMED = dataclasses.replace(PLAIN, time_embeddings=3)
B, M, F, P, D = 2, 2, 5, 3, 8
FRAMES = np.array([[2, 5], [0, 3]], np.int32)


def some_features(seed=0):
    return np.random.default_rng(seed).standard_normal((B, M, F, P, D)).astype(np.float32)


@functools.cache
def model(config):
    module = PerceiverResampler(config, D, jnp.float32)
    params = random_params(module, some_features(), FRAMES)
    return jax.jit(lambda params, *inputs: module.apply({"params": params}, *inputs)[0]), params


def visual(config, features, frames=FRAMES):
    apply, params = model(config)
    return np.asarray(apply(params, features, frames))


@pytest.mark.parametrize("config", [PLAIN, TIMED])
def test_what_absent_frames_hold_changes_nothing(config):
    features = some_features()
    expected = visual(config, features)
    absent = np.arange(F) >= FRAMES[..., None]
    features[absent] = 1e3
    np.testing.assert_array_equal(visual(config, features), expected)
    features[0, 0, 1] = 0  # the last frame of the slot that is there
    changed = np.abs(visual(config, features) - expected).max((2, 3)) > 1e-3
    np.testing.assert_array_equal(changed, [[True, False], [False, False]])


@pytest.mark.parametrize(("config", "matters"), [(PLAIN, False), (TIMED, True)])
def test_the_order_of_frames_matters_with_time_embeddings_alone(config, matters):
    features = some_features()
    turned = features.copy()
    turned[1, 1, :3] = features[1, 1, 2::-1]
    difference = np.abs(visual(config, turned) - visual(config, features))
    assert difference[:, 0].max() == difference[0].max() == 0
    assert (difference[1, 1].max() > 1e-2) == matters
    if not matters:
        assert difference.max() < 1e-5


def test_the_order_of_patches_does_not_matter():
    features = some_features()
    np.testing.assert_allclose(visual(TIMED, features[:, :, :, ::-1]), visual(TIMED, features), atol=1e-5)


def test_time_embeddings_are_stretched_over_more_frames_than_were_learned():
    table = model(TIMED)[1]["time_embeddings"]
    apply, _ = model(PLAIN)
    timed = {name: value for name, value in model(TIMED)[1].items() if name != "time_embeddings"}
    embedded = {
        2: table[:2],  # as many as are there, not stretched
        3: table,
        5: np.stack([table[0], (table[0] + table[1]) / 2, table[1], (table[1] + table[2]) / 2, table[2]]),
        4: np.stack([table[0], table[0] / 3 + table[1] * 2 / 3, table[1] * 2 / 3 + table[2] / 3, table[2]]),
    }
    for count, rows in embedded.items():
        features = some_features()
        frames = np.full((B, M), count, np.int32)
        expected = features.copy()
        expected[:, :, :count] += rows[:, None]
        np.testing.assert_allclose(visual(TIMED, features, frames), apply(timed, expected, frames), atol=1e-5)


def test_a_slot_without_frames_is_finite():
    apply, params = model(TIMED)
    frames = np.zeros((B, M), np.int32)
    loss = lambda params, features: jnp.sum(apply(params, features, frames) ** 2)
    assert np.isfinite(visual(TIMED, some_features(), frames)).all()
    gradients, of_features = jax.jit(jax.grad(loss, argnums=(0, 1)))(params, some_features())
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradients))
    assert not np.asarray(of_features).any()


def test_slots_do_not_see_each_other():
    features = some_features()
    expected = visual(PLAIN, features)
    features[0, 0] += 1
    changed = np.abs(visual(PLAIN, features) - expected).max((2, 3)) > 0
    np.testing.assert_array_equal(changed, [[True, False], [False, False]])


def test_the_weights_are_over_the_frames_that_are_there_and_the_latents():
    module = PerceiverResampler(TIMED, D, jnp.float32)
    look = jax.jit(lambda params, x: module.apply({"params": params}, x, FRAMES, return_attention=True))
    _, weights = look(model(TIMED)[1], some_features())
    assert weights.shape == (2, B, M, 4, F * P + 4)
    np.testing.assert_allclose(weights.sum(-1), 1, atol=1e-5)
    hidden = np.repeat(np.arange(F) >= FRAMES[..., None], P, axis=-1)
    of_hidden = np.moveaxis(np.asarray(weights), 3, 0)[..., : F * P] * hidden
    assert not of_hidden.any()
    assert np.asarray(weights)[:, 0, 0, :, : 2 * P].all()
