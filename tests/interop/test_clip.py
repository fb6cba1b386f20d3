"""CLIP's vision tower against transformers, hidden state by hidden state."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch_helpers import compare, converted, randomised, state_of
from transformers import CLIPVisionConfig, CLIPVisionModel

from vlm_jax.interop import clip
from vlm_jax.interop.engine import to_ours
from vlm_jax.interop.plan import ConversionError
from vlm_jax.layers.vit import Vit
from vlm_jax.sharding import Named

SIZES = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, image_size=16, patch_size=4)


def oracle(**changes):
    config = CLIPVisionConfig(**SIZES | changes)
    return randomised(CLIPVisionModel(config)), clip.config_from_hf(config)


def images(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(1).integers(0, 256, (2, height, width, 3), dtype=np.uint8)


def pixel_values(pixels: np.ndarray, config) -> torch.Tensor:
    x = (pixels / 255.0 - np.array(config.mean)) / np.array(config.std)
    return torch.tensor(x.transpose(0, 3, 1, 2), dtype=torch.float32)


def shapes(config):
    side = config.image_size
    boxed = jax.eval_shape(Vit(config, jnp.float32).init, jax.random.key(0), np.zeros((1, side, side, 3), np.uint8))
    return jax.tree.map(lambda box: box.value, boxed["params"], is_leaf=lambda x: isinstance(x, Named))


def features(config, params, pixels):
    return jax.jit(Vit(config, jnp.float32).apply)({"params": params}, pixels)


def run(model, config, pixels, interpolate=False):
    with torch.no_grad():
        return model(pixel_values=pixel_values(pixels, config), output_hidden_states=True, interpolate_pos_encoding=interpolate)


@pytest.mark.parametrize(
    "changes",
    [dict(), dict(hidden_act="gelu", patch_size=8, num_attention_heads=2, layer_norm_eps=0.1)],
    ids=["quick_gelu", "gelu"],
)
def test_every_hidden_state(changes):
    model, config = oracle(**changes)
    config = dataclasses.replace(config, post_norm="held", class_token="kept")
    params = converted(state_of(model), clip.table(config), shapes(config))
    pixels = images(16, 16)
    theirs = run(model, config, pixels).hidden_states
    for layer in range(config.layers + 1):
        picked = dataclasses.replace(config, feature_layer=layer)
        compare(features(picked, params, pixels), theirs[layer])
    before_last = dataclasses.replace(config, feature_layer=-2, class_token="dropped")
    compare(features(before_last, params, pixels), theirs[-2][:, 1:])


def test_post_norm():
    model, config = oracle()
    config = dataclasses.replace(config, class_token="kept")
    params = converted(state_of(model), clip.table(config), shapes(config))
    pixels = images(16, 16)
    theirs = run(model, config, pixels)
    ours = features(config, params, pixels)
    compare(ours[:, 0], theirs.pooler_output)
    compare(ours, model.post_layernorm(theirs.last_hidden_state))


@pytest.mark.parametrize("size", [(28, 28), (12, 12), (20, 32), (36, 8)])
def test_positions_are_interpolated(size):
    model, config = oracle()
    config = dataclasses.replace(config, post_norm="held", class_token="kept")
    params = converted(state_of(model), clip.table(config), shapes(config))
    pixels = images(*size)
    compare(features(config, params, pixels), run(model, config, pixels, interpolate=True).last_hidden_state)


def test_names_of_hub_files():
    model, config = oracle()
    state = state_of(model)
    hub = {f"vision_model.{name}": tensor for name, tensor in state.items()}
    hub["vision_model.embeddings.position_ids"] = np.arange(17)[None]
    table = clip.table(config)
    jax.tree.map(np.testing.assert_array_equal, to_ours(hub, table, shapes(config)), to_ours(state, table, shapes(config)))
    name = "pre_layrnorm.bias"
    with pytest.raises(ConversionError, match=f"more than once.*\n.*{name} and vision_model.{name}"):
        to_ours(hub | {name: state[name]}, table, shapes(config))
