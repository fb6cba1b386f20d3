"""Pixel shuffle against Idefics3's connector."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import Idefics3Config
from transformers.models.idefics3.modeling_idefics3 import Idefics3Connector

from tests.tiny import mesh_of, random_params
from vlm_jax.config import NormConfig, PixelShuffleConfig
from vlm_jax.layers.pixel_shuffle import PixelShuffle

WIDTH, OUT = 12, 16


def ours_and_theirs(factor, side, frames=2, **settings):
    config = PixelShuffleConfig(width=OUT, factor=factor, **settings)
    module = PixelShuffle(config, WIDTH, jnp.float32)
    features = np.random.default_rng(side).normal(size=(2, 3, frames, side * side, WIDTH)).astype(np.float32)
    count = np.full((2, 3), frames, np.int32)
    params = random_params(module, features, count)
    heads = dict(num_attention_heads=1)
    sizes = dict(vision_config=heads | dict(hidden_size=WIDTH), text_config=heads | dict(hidden_size=OUT))
    published = Idefics3Config(scale_factor=factor, **sizes)
    connector = Idefics3Connector(published)
    connector.modality_projection.proj.weight.data = torch.tensor(params["linear"]["kernel"].T)
    with torch.no_grad():
        read = torch.tensor(features.reshape(-1, side * side, WIDTH))
        if config.norm is not None:
            scale, bias = (torch.tensor(params["norm"][name]) for name in ("scale", "bias"))
            read = torch.nn.functional.layer_norm(read, (WIDTH,), scale, bias, config.norm.eps)
        theirs = connector(read).numpy()
    apply = jax.jit(lambda params: module.apply({"params": params}, features, count)[0])
    assert config.visual_tokens(frames, side * side) == frames * theirs.shape[1]
    return apply, params, theirs.reshape(2, 3, -1, OUT)


@pytest.mark.parametrize(("factor", "side"), [(2, 4), (3, 6), (4, 8), (1, 3)])
def test_visual_tokens_are_those_of_idefics3(factor, side):
    apply, params, theirs = ours_and_theirs(factor, side)
    assert theirs.std() > 0.1
    np.testing.assert_allclose(apply(params), theirs, atol=1e-5)


def test_normed_features_and_the_deviation_they_begin_with():
    settings = dict(norm=NormConfig(kind="layer", eps=1e-6), initial_std=0.2)
    apply, params, theirs = ours_and_theirs(2, 4, **settings)
    np.testing.assert_allclose(apply(params), theirs, atol=1e-5)
    module = PixelShuffle(PixelShuffleConfig(width=256, factor=2, **settings), 64, jnp.float32)
    features = 30 * np.random.default_rng(0).normal(size=(1, 1, 1, 64, 64)) + 5
    visual, _ = module.init_with_output(jax.random.key(0), features, np.ones((1, 1)))[0]
    assert visual.std() == pytest.approx(0.2, rel=0.05)


def test_a_mesh_gives_the_same():
    apply, params, theirs = ours_and_theirs(2, 4)
    with jax.set_mesh(mesh_of(2, 2, 2)):
        np.testing.assert_allclose(apply(params), theirs, atol=1e-5)


def test_what_is_no_square_is_refused():
    module = PixelShuffle(PixelShuffleConfig(width=OUT, factor=2), WIDTH, jnp.float32)
    with pytest.raises(ValueError, match="12 features are no square whose side is a multiple of 2"):
        module.init(jax.random.key(0), np.zeros((1, 1, 1, 12, WIDTH)), np.ones((1, 1)))
