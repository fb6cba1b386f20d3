"""What the backward pass recomputes changes memory and time, and no number."""

import functools

import jax
import numpy as np
import pytest

from tests.tiny import next_token_sums, random_batch, random_params, thorough, tiny_model
from vlm_jax.models.vlm import VisionLanguageModel

BATCH = random_batch(2)


@functools.cache
def params():
    return random_params(VisionLanguageModel(tiny_model()), BATCH)


def loss_and_gradients(remat):
    model = VisionLanguageModel(tiny_model(), remat=remat)
    return jax.value_and_grad(lambda params: next_token_sums(model.apply({"params": params}, BATCH), BATCH)["loss"])


@functools.cache
def numbers(remat):
    return jax.jit(loss_and_gradients(remat))(params())


@pytest.mark.parametrize("remat", ["dots", thorough("full")])
def test_loss_and_gradients_stay_the_same(remat):
    (loss, gradients), (expected, of_none) = numbers(remat), numbers("none")
    np.testing.assert_allclose(loss, expected, rtol=1e-6)
    for path, gradient in jax.tree_util.tree_leaves_with_path(gradients):
        name = jax.tree_util.keystr(path)
        reference = np.asarray(functools.reduce(lambda tree, key: tree[key.key], path, of_none))
        assert reference.any(), name
        np.testing.assert_allclose(gradient, reference, atol=1e-5 * np.abs(reference).max(), err_msg=name)


def test_more_is_recomputed_from_none_to_full():
    products = {r: str(jax.make_jaxpr(loss_and_gradients(r))(params())).count("dot_general") for r in ("none", "dots", "full")}
    assert products["none"] < products["dots"] < products["full"]
