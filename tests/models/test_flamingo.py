"""The whole model: what an image changes, and for which tokens."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.tiny import random_batch, random_params, tiny_model
from vlm_jax.config import ModelConfig
from vlm_jax.models.vlm import VisionLanguageModel

MODES = ["last", "all_previous"]


def batch_of(last, first=None, slots=3):
    """One segment of random tokens, the slots they see, and random images; two equal rows but for the tokens."""
    rng, rows = np.random.default_rng(0), 2
    last = np.repeat([last], rows, axis=0).astype(np.int32)
    positions = np.repeat(np.arange(last.shape[1], dtype=np.int32)[None], rows, axis=0)
    first = np.ones_like(last) if first is None else np.repeat([first], rows, axis=0).astype(np.int32)
    return dataclasses.replace(
        random_batch(rows),
        images=rng.integers(0, 256, (rows, slots, 1, 16, 16, 3), dtype=np.uint8),
        frames=np.ones((rows, slots), np.int32),
        tokens=rng.integers(1, 300, last.shape, dtype=np.int32),
        positions=positions,
        segments=np.ones_like(last),
        media_last=last,
        media_first=first,
        prefix_end=positions,
        targets=rng.integers(1, 300, last.shape, dtype=np.int32),
        weights=np.ones(last.shape, np.float32),
    )


@functools.cache
def model(mode="last"):
    config = tiny_model()
    config = dataclasses.replace(config, fusion=dataclasses.replace(config.fusion, media=mode))
    module = VisionLanguageModel(config)
    return jax.jit(lambda params, batch: module.apply({"params": params}, batch))


@functools.cache
def params():
    return random_params(VisionLanguageModel(tiny_model()), random_batch(1))


def logits(batch, mode="last"):
    return np.asarray(model(mode)(params(), batch))


def with_images(batch, change):
    images = batch.images.copy()
    change(images)
    return dataclasses.replace(batch, images=images)


INTERLEAVED = [0, 1, 1, 2, 2, 2, 3, 3]


def test_with_closed_gates_it_is_the_language_model_bit_for_bit():
    batch = batch_of(INTERLEAVED)
    layers = params()["fusion"]["layers"]
    closed = layers | {name: np.zeros_like(layers[name]) for name in ("attention_gate", "mlp_gate")}
    alone = VisionLanguageModel(ModelConfig(vision=None, connector=None, fusion=None, language=tiny_model().language))
    expected = jax.jit(alone.apply)({"params": {"language": params()["language"]}}, batch)
    ours = model()(params() | {"fusion": {"layers": closed}}, batch)
    np.testing.assert_array_equal(ours, expected)
    assert np.abs(logits(batch) - expected).max() > 0.1


def test_a_fresh_model_is_its_language_model():
    @jax.jit
    def gates(key):
        layers = VisionLanguageModel(tiny_model()).init(key, random_batch(1))["params"]["fusion"]["layers"]
        return layers["attention_gate"].value, layers["mlp_gate"].value

    assert not np.any(gates(jax.random.key(0)))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("slot", [0, 1, 2])
def test_an_image_changes_the_tokens_from_its_place_on_and_no_other(mode, slot):
    batch = batch_of(INTERLEAVED)
    changed = with_images(batch, lambda images: images[:, slot].__isub__(100))
    moved = np.abs(logits(changed, mode) - logits(batch, mode)).max((0, 2))
    after = np.array(INTERLEAVED) > slot
    assert not moved[~after].any()
    assert (moved[after] > 1e-3).all()


@pytest.mark.parametrize("mode", MODES)
def test_the_order_of_context_images_matters(mode):
    batch = batch_of(INTERLEAVED)
    swapped = with_images(batch, lambda images: images.__setitem__(np.s_[:, :2], images[:, 1::-1].copy()))
    difference = np.abs(logits(swapped, mode) - logits(batch, mode))[:, -1]
    assert difference.max() > 1e-3


def test_the_modes_differ_only_from_the_second_image_on():
    batch = batch_of(INTERLEAVED)
    moved = np.abs(logits(batch, "last") - logits(batch, "all_previous")).max((0, 2))
    np.testing.assert_array_equal(moved > 1e-4, np.array(INTERLEAVED) > 1)


@pytest.mark.parametrize("mode", MODES)
def test_an_empty_slot_nobody_sees_may_hold_anything(mode):
    last = [0, 1, 1, 2, 2, 2, 2, 2]
    batch = batch_of(last)
    batch.frames[:, 2] = 0
    changed = with_images(batch, lambda images: images[:, 2].fill(7))
    np.testing.assert_array_equal(logits(changed, mode), logits(batch, mode))


@pytest.mark.parametrize("mode", MODES)
def test_a_segment_does_not_see_the_images_of_another(mode):
    last, first = [0, 1, 1, 2, 0, 3, 3, 3], [1, 1, 1, 1, 3, 3, 3, 3]
    batch = batch_of(last, first)
    batch.segments[:] = [1, 1, 1, 1, 2, 2, 2, 2]
    batch.positions[:] = [0, 1, 2, 3] * 2
    changed = with_images(batch, lambda images: images[:, :2].__isub__(100))
    moved = np.abs(logits(changed, mode) - logits(batch, mode)).max((0, 2))
    np.testing.assert_array_equal(moved > 0, [False, True, True, True, False, False, False, False])


def test_rows_without_an_image_have_finite_logits_and_gradients():
    batch = batch_of([0] * 8)
    batch.frames[:] = 0
    batch.media_last[1] = INTERLEAVED  # the second row has images
    batch.frames[1] = 1
    blind = dataclasses.replace(batch, media_last=np.zeros_like(batch.media_last), frames=np.zeros_like(batch.frames))

    @jax.jit
    def gradient(params, batch):
        return jax.value_and_grad(lambda params: 1e3 * jnp.sum(model()(params, batch) ** 2))(params)

    for some in (batch, blind):
        value, gradients = gradient(params(), some)
        assert np.isfinite(value)
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradients))
        seen = [np.any(leaf) for leaf in jax.tree.leaves((gradients["vision"], gradients["connector"]))]
        assert any(seen) == (some is batch)
    changed = with_images(batch, lambda images: images[0].__isub__(100))
    np.testing.assert_array_equal(logits(changed)[0], logits(batch)[0])


@pytest.mark.parametrize("mode", MODES)
def test_a_batch_without_pictures_is_one_of_empty_slots(mode):
    """The gated layers' feed-forward applies to every token all the same."""
    empty = batch_of([0] * 8, first=[0] * 8)
    empty.frames[:] = 0
    without = dataclasses.replace(empty, images=None, frames=None)
    np.testing.assert_allclose(logits(without, mode), logits(empty, mode), atol=1e-5)
    alone = VisionLanguageModel(ModelConfig(vision=None, connector=None, fusion=None, language=tiny_model().language))
    text = jax.jit(alone.apply)({"params": {"language": params()["language"]}}, without)
    assert np.abs(logits(without, mode) - text).max() > 0.1


def test_half_an_eye_is_an_error():
    config = dataclasses.replace(tiny_model(), connector=None)
    with pytest.raises(ValueError, match="vision, connector and fusion are all there, or none of them is"):
        VisionLanguageModel(config).init(jax.random.key(0), random_batch(1))
