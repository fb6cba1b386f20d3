"""Any vision encoder stands in a whole model."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.tiny import random_batch, random_params, tiny_model
from vlm_jax.models.vlm import VisionLanguageModel

CONFIG = tiny_model()
ENCODERS = {
    "siglip": dict(class_token="none", patch_bias=True, pre_norm=False),
    "dinov2": dict(
        registers=2,
        patch_bias=True,
        pre_norm=False,
        antialias=True,
        class_token="kept",
        block=dataclasses.replace(CONFIG.vision.block, gated_mlp=True, activation="silu", layer_scale=True),
    ),
}


@pytest.mark.parametrize("encoder", ENCODERS)
def test_the_encoder_is_seen_and_trained(encoder):
    model = VisionLanguageModel(dataclasses.replace(CONFIG, vision=dataclasses.replace(CONFIG.vision, **ENCODERS[encoder])))
    batch = random_batch(2)
    params = random_params(model, batch)

    @jax.jit
    @jax.grad
    def gradient(params):
        return jnp.sum(jnp.square(model.apply({"params": params}, batch)[0]))

    # Not the keys' biases: no softmax sees them.
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradient(params)["vision"]):
        name = jax.tree_util.keystr(path)
        assert np.isfinite(leaf).all(), name
        if "['key']['bias']" not in name:
            assert np.abs(leaf).max() > 1e-4, name
