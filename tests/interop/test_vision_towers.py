"""Vision towers against transformers, hidden state by hidden state."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from torch_helpers import compare, converted, pixel_values, random_images, randomised, shapes_of, state_of
from transformers import (
    Blip2VisionConfig,
    Blip2VisionModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    SiglipVisionConfig,
    SiglipVisionModel,
    image_utils,
)

from tests.tiny import thorough
from vlm_jax.families import clip, dinov2, eva_clip, siglip
from vlm_jax.interop.engine import to_ours
from vlm_jax.interop.plan import ConversionError
from vlm_jax.interop.register import VISION
from vlm_jax.layers.vit import Vit

SIZES = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, image_size=16, patch_size=4)
CLIP_SIZES = SIZES | dict(intermediate_size=48)
prefixed = lambda table: lambda config: table(config).under("[vision_model.]")
FAMILIES = {  # config, model, ours of the config, its table, sizes
    "clip": (CLIPVisionConfig, CLIPVisionModel, clip.vision_from_hf, prefixed(clip.vision_table), CLIP_SIZES),
    "siglip": (SiglipVisionConfig, SiglipVisionModel, siglip.vision_from_hf, prefixed(siglip.vision_table), CLIP_SIZES),
    "eva_clip": (Blip2VisionConfig, Blip2VisionModel, eva_clip.config_from_hf, eva_clip.table, CLIP_SIZES),
    "dinov2": (Dinov2Config, Dinov2Model, dinov2.config_from_hf, dinov2.state_dict_table, SIZES),
    "registers": (
        Dinov2WithRegistersConfig,
        Dinov2WithRegistersModel,
        dinov2.config_from_hf,
        dinov2.with_registers(dinov2.state_dict_table),
        SIZES,
    ),
}
CASES = [
    ("clip", dict()),
    ("clip", dict(hidden_act="gelu", patch_size=8, num_attention_heads=2, layer_norm_eps=0.1)),
    ("clip", dict(hidden_size=30, num_attention_heads=3, hidden_act="gelu_new", num_hidden_layers=1)),
    ("siglip", dict()),
    ("siglip", dict(image_size=18, hidden_act="gelu", vision_use_head=False)),  # 18 pixels are 4 patches of 4, and 2 more
    ("siglip", dict(hidden_size=30, num_attention_heads=5, patch_size=8, layer_norm_eps=0.1)),
    ("eva_clip", dict()),
    ("eva_clip", dict(qkv_bias=False, hidden_act="quick_gelu", layer_norm_eps=0.1)),
    ("eva_clip", dict(hidden_size=24, num_attention_heads=3, patch_size=8, num_hidden_layers=3)),
    ("dinov2", dict()),
    ("dinov2", dict(use_swiglu_ffn=True, hidden_size=24, num_attention_heads=3, layer_norm_eps=0.1)),
    ("dinov2", dict(qkv_bias=False, hidden_act="gelu_new", mlp_ratio=2, patch_size=8, use_mask_token=False)),
    ("registers", dict()),
    ("registers", dict(num_register_tokens=1, use_swiglu_ffn=True, num_attention_heads=2)),
    ("registers", dict(num_register_tokens=0)),
]


def random_cases(family: str, count: int = 3) -> list[tuple[str, dict]]:
    rng = np.random.default_rng(sorted(FAMILIES).index(family))
    pick = lambda *choices: choices[rng.integers(len(choices))]

    def case() -> dict:
        heads, patch = pick(1, 2, 3, 5), pick(2, 3, 5)
        sizes = dict(num_attention_heads=heads, hidden_size=heads * pick(6, 8, 14), num_hidden_layers=pick(1, 2, 3))
        act = "gelu" if family == "registers" else pick("gelu", "quick_gelu", "gelu_pytorch_tanh", "relu")
        sizes |= dict(patch_size=patch, image_size=patch * pick(1, 2, 3), hidden_act=act)
        if "intermediate_size" in FAMILIES[family][4]:
            return sizes | dict(intermediate_size=pick(20, 33, 64))
        return sizes | dict(mlp_ratio=pick(1, 2, 3), use_swiglu_ffn=pick(True, False))

    return [(family, case()) for _ in range(count)]


def oracle(family, **changes):
    """The torch model, our configuration with every token that we give, and the parameters."""
    hf_config, hf_model, ours, table, sizes = FAMILIES[family]
    config = hf_config(**sizes | changes)
    model = randomised(hf_model(config))
    config = ours(config)
    config = dataclasses.replace(config, class_token="kept" if config.class_token != "none" else "none")
    return model, config, converted(state_of(model), table(config), shapes(config))


def shapes(config):
    return shapes_of(Vit(config, jnp.float32), np.zeros((1, config.image_size, config.image_size, 3), np.uint8))


def features(config, params, pixels, **variants):
    """One result for each value of the one changed field."""
    ((field, values),) = variants.items()
    models = [Vit(dataclasses.replace(config, **{field: value}), jnp.float32) for value in values]
    return jax.jit(lambda params: [model.apply({"params": params}, pixels) for model in models])(params)


def run(model, config, pixels, interpolate=False):
    # DINOv2 interpolates without being asked.
    asked = dict(interpolate_pos_encoding=True) if interpolate and not isinstance(model.config, Dinov2Config) else {}
    with torch.no_grad():
        return model(pixel_values=pixel_values(pixels, config), output_hidden_states=True, **asked)


def without_registers(hidden, config):
    return torch.cat([hidden[:, :1], hidden[:, 1 + config.registers :]], dim=1) if config.registers else hidden


@pytest.mark.parametrize("family, changes", CASES + [thorough(*case) for family in FAMILIES for case in random_cases(family)])
def test_every_hidden_state(family, changes):
    model, config, params = oracle(family, **changes)
    pixels = random_images(config.image_size, config.image_size)
    theirs = run(model, config, pixels)
    plain = dataclasses.replace(config, post_norm="held")
    every = range(config.layers + 1)
    assert len(theirs.hidden_states) == len(every)
    for ours, hidden in zip(features(plain, params, pixels, feature_layer=every), theirs.hidden_states, strict=True):
        compare(ours, without_registers(hidden, config))
    last = theirs.last_hidden_state
    with torch.no_grad():
        expected = model.post_layernorm(last) if family == "clip" else without_registers(last, config)
    (ours,) = features(config, params, pixels, post_norm=["applied"])
    compare(ours, expected)
    if family in ("clip", "dinov2", "registers"):
        compare(ours[:, 0], theirs.pooler_output)


@pytest.mark.parametrize("family", FAMILIES)
def test_positions_are_interpolated(family):
    model, config, params = oracle(family)
    config = dataclasses.replace(config, post_norm="held")
    for size in [(28, 28), (12, 12), (20, 32), (36, 8), (8, 32)]:
        pixels = random_images(*size)
        theirs = run(model, config, pixels, interpolate=True)
        last = -1 if size == (20, 32) else 0
        (ours,) = features(config, params, pixels, feature_layer=[last])
        compare(ours, without_registers(theirs.hidden_states[last], config))


@pytest.mark.parametrize("family", ["clip", "siglip", "eva_clip"])
def test_names_of_hub_files(family):
    model, config, params = oracle(family)
    state = state_of(model)
    hub = {f"vision_model.{name}": tensor for name, tensor in state.items()}
    if family == "clip":
        hub["vision_model.embeddings.position_ids"] = np.arange(17)[None]
    table = FAMILIES[family][3](config)
    jax.tree.map(np.testing.assert_array_equal, to_ours(hub, table, shapes(config)), params)
    name = "post_layernorm.bias"
    with pytest.raises(ConversionError, match=f"more than once.*\n.*{name} and vision_model.{name}"):
        to_ours(hub | {name: state[name]}, table, shapes(config))


@pytest.mark.parametrize("changes", [dict(), dict(use_swiglu_ffn=True)], ids=["mlp", "swiglu"])
@pytest.mark.parametrize("family", ["dinov2", "registers"])
def test_dinov2_as_transformers_saves_it(family, changes, tmp_path):
    model, config, params = oracle(family, **changes)
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    again = converted(saved, dinov2.table(config), shapes(config))
    jax.tree.map(np.testing.assert_array_equal, again, params)


def test_pixels_are_normalised_as_published():
    published = {
        "clip": (image_utils.OPENAI_CLIP_MEAN, image_utils.OPENAI_CLIP_STD),
        "siglip": (image_utils.IMAGENET_STANDARD_MEAN, image_utils.IMAGENET_STANDARD_STD),
        "eva_clip": (image_utils.OPENAI_CLIP_MEAN, image_utils.OPENAI_CLIP_STD),
        "dinov2": (image_utils.IMAGENET_DEFAULT_MEAN, image_utils.IMAGENET_DEFAULT_STD),
        "registers": (image_utils.IMAGENET_DEFAULT_MEAN, image_utils.IMAGENET_DEFAULT_STD),
    }
    for family, (hf_config, _, ours, _, sizes) in FAMILIES.items():
        config = ours(hf_config(**sizes))
        assert (config.mean, config.std) == tuple(map(tuple, published[family]))


def test_other_towers_and_pictures_are_refused():
    with pytest.raises(ValueError, match="a vision encoder of model_type 'vit' is not known: expected one of 'clip_vision"):
        VISION["vit"]
    with pytest.raises(ValueError, match=r"image_size=\[16, 8\]; only squares"):
        dinov2.config_from_hf(Dinov2Config(**SIZES | dict(image_size=[16, 8])))
    with pytest.raises(ValueError, match=r"num_channels=1 \(only 3 is implemented\)"):
        siglip.vision_from_hf(SiglipVisionConfig(num_channels=1))
