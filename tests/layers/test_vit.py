import dataclasses
import functools
import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.tiny import random_params, tiny_model
from vlm_jax.layers.vit import Vit

CONFIG = dataclasses.replace(tiny_model().vision, layers=3, post_norm="none", class_token="kept")
IMAGES = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3), dtype=np.uint8)


@functools.cache
def params():
    """With `post_norm`, which leaves the others as they are."""
    return random_params(Vit(dataclasses.replace(CONFIG, post_norm="applied"), jnp.float32), IMAGES)


def features(images=IMAGES, **changes):
    model = Vit(dataclasses.replace(CONFIG, **changes), jnp.float32)
    return np.asarray(jax.jit(model.apply)({"params": params()}, images))


def test_hidden_states_are_counted_from_both_ends():
    for index in range(4):
        for same in (index, index - 4):
            assert Vit(dataclasses.replace(CONFIG, feature_layer=same), jnp.float32).used_layers() == (index,)
    every = [features(feature_layer=index) for index in (0, 1, -2, -1)]
    for one, other in itertools.pairwise(every):
        assert np.abs(one - other).max() > 0.01
    # A tower that ends there gives the same.
    lower = params() | {"layers": jax.tree.map(lambda p: p[:2], params()["layers"])}
    short = Vit(dataclasses.replace(CONFIG, layers=2), jnp.float32)
    np.testing.assert_allclose(jax.jit(short.apply)({"params": lower}, IMAGES), every[2], atol=1e-5)


@pytest.mark.parametrize("post_norm", ["none", "applied"])
def test_features_of_several_layers_are_joined(post_norm):
    each = {index: features(feature_layer=index, post_norm=post_norm) for index in (0, 2, -1)}
    chosen = (2, -1, 0, 2)
    joined = features(feature_layer=chosen, post_norm=post_norm)
    np.testing.assert_allclose(joined, np.concatenate([each[index] for index in chosen], axis=-1), atol=1e-6)
    assert joined.shape[-1] == dataclasses.replace(CONFIG, feature_layer=chosen).width == 4 * 16


@pytest.mark.parametrize("index, named", [(4, "4"), (-5, "-5"), (24, "24"), ((0, 4), "4"), ((), r"\(\)")])
def test_a_layer_that_is_not_there_is_an_error(index, named):
    with pytest.raises(ValueError, match=rf"feature_layer {named}: a ViT of 3 layers has hidden states -4\.\.3"):
        features(feature_layer=index)


def test_the_class_token_stands_in_front():
    np.testing.assert_array_equal(features(class_token="dropped"), features()[:, 1:])
    assert features().shape == (2, 5, 16)


def test_registers_are_seen_and_given_if_asked():
    config = dataclasses.replace(CONFIG, registers=3)
    params = random_params(Vit(config, jnp.float32), IMAGES)
    assert params["registers"].shape == (3, 16)

    def run(**changes):
        return np.asarray(Vit(dataclasses.replace(config, **changes), jnp.float32).apply({"params": params}, IMAGES))

    before = run()
    assert before.shape == (2, 5, 16)
    np.testing.assert_array_equal(run(class_token="dropped"), before[:, 1:])
    for class_token, front in (("kept", 1), ("dropped", 0)):
        given = run(class_token=class_token, keep_registers=True)
        shown = dataclasses.replace(config, class_token=class_token, keep_registers=True)
        assert given.shape[1] == shown.frame_features == 7 + front and shown.front_features == 3 + front
        np.testing.assert_array_equal(np.delete(given, range(front, front + 3), axis=1), run(class_token=class_token))
    params["registers"] = -params["registers"]
    assert np.abs(run() - before).max() > 0.01


def test_a_tower_may_have_no_class_token():
    config = dataclasses.replace(CONFIG, class_token="none")
    params = random_params(Vit(config, jnp.float32), IMAGES)
    assert "class_embedding" not in params and params["position_embedding"].shape == (4, 16)
    assert Vit(config, jnp.float32).apply({"params": params}, IMAGES).shape == (2, 4, 16)


@pytest.mark.parametrize("held", [dict(pooling_head=True), dict(mask_token=True), dict(post_norm="held")], ids=str)
def test_what_is_held_changes_nothing(held):
    some = random_params(Vit(dataclasses.replace(CONFIG, **held), jnp.float32), IMAGES)
    extra = some.keys() - params().keys()
    run = lambda **changes: Vit(dataclasses.replace(CONFIG, **changes), jnp.float32).apply({"params": some}, IMAGES)
    assert extra or "post_norm" in held
    np.testing.assert_array_equal(run(**held), run())


def test_a_remainder_is_left_out_only_where_the_published_size_has_one():
    config = dataclasses.replace(CONFIG, image_size=19)
    run = lambda images: jax.jit(Vit(config, jnp.float32).apply)({"params": params()}, images)
    images = np.random.default_rng(2).integers(0, 256, (1, 19, 19, 3), dtype=np.uint8)
    np.testing.assert_array_equal(run(images), run(images[:, :16, :16]))


def test_post_norm_normalises_what_leaves():
    plain, scale, bias = features(), params()["post_norm"]["scale"], params()["post_norm"]["bias"]
    centred = plain - plain.mean(-1, keepdims=True)
    expected = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5) * scale + bias
    np.testing.assert_allclose(features(post_norm="applied"), expected, atol=1e-5)


def test_the_embeddings_by_hand():
    pixels = (IMAGES / 255.0 - CONFIG.mean) / CONFIG.std
    kernel = params()["patch_embedding"]["kernel"]
    rows = [params()["class_embedding"] + params()["position_embedding"][0]]
    for patch, (y, x) in enumerate([(0, 0), (0, 8), (8, 0), (8, 8)]):
        rows.append(pixels[1, y : y + 8, x : x + 8].ravel() @ kernel + params()["position_embedding"][1 + patch])
    x = np.stack(rows)
    x = x - x.mean(-1, keepdims=True)
    x = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5)
    expected = x * params()["pre_norm"]["scale"] + params()["pre_norm"]["bias"]
    np.testing.assert_allclose(features(feature_layer=0)[1], expected, atol=1e-4)


def test_larger_and_oblong_pictures_get_interpolated_positions():
    wide = np.random.default_rng(1).integers(0, 256, (1, 16, 32, 3), dtype=np.uint8)
    assert features(wide).shape == (1, 1 + 2 * 4, 16)
    with pytest.raises(ValueError, match="20x16 pixels"):
        features(np.zeros((1, 20, 16, 3), np.uint8))


def test_positions_may_be_learned_for_another_size():
    pixels = np.random.default_rng(3).integers(0, 256, (1, 32, 32, 3), dtype=np.uint8)
    resized = dataclasses.replace(CONFIG, image_size=32, learned_size=16)
    ours = jax.jit(Vit(resized, jnp.float32).apply)({"params": params()}, pixels)
    np.testing.assert_array_equal(ours, features(pixels))
    assert resized.frame_features == ours.shape[1] == 17


def test_initial_deviations_are_those_of_the_configuration():
    def deviations(config):
        params = Vit(config, jnp.float32).init(jax.random.key(0), IMAGES)["params"]
        flat = jax.tree_util.tree_leaves_with_path(nn.meta.unbox(params))
        return {jax.tree_util.keystr(path): float(jnp.std(leaf)) for path, leaf in flat}

    choosy = dataclasses.replace(CONFIG, position_init=0.5, block=dataclasses.replace(CONFIG.block, query_init=3.0))
    before, after = deviations(CONFIG), deviations(choosy)
    changed = {path: after[path] / before[path] for path in before if before[path] != after[path]}
    assert changed == {
        "['layers']['attention']['query']['kernel']": pytest.approx(3),
        "['position_embedding']": pytest.approx(0.5 * CONFIG.block.width**0.5),
    }
