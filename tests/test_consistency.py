"""Sizes of a configuration that cannot go together are found when it is read, from the command line and from a folder alike."""

import dataclasses

import pytest

from tests.tiny import tiny_model, tiny_run
from vlm_jax.config import (
    DynamicNtkScaling,
    ExpertsConfig,
    Llama3Scaling,
    LongRopeScaling,
    RopeConfig,
    RunConfig,
    YarnScaling,
)
from vlm_jax.config.consistency import check_consistent
from vlm_jax.config_dict import from_dict, to_dict


def changed(config, path, value):
    """The configuration with the field at a dotted path changed."""
    name, _, rest = path.partition(".")
    return dataclasses.replace(config, **{name: changed(getattr(config, name), rest, value) if rest else value})


def rope(scaling=None, **values):
    return RopeConfig(**dict(base=10_000.0, scaling=scaling) | values)


LONGROPE = dict(original_max_positions=64, attention_factor=1.0)
LLAMA3 = dict(factor=2.0, original_max_positions=64)
YARN = LLAMA3 | dict(attention_factor=1.0)
# Heads of 4 numbers, 2 frequencies; 3 layers.
WRONG = {
    "language.block.kv_heads": (3, "language.block: heads=8 and kv_heads=3: expected a multiple"),
    "vision.block.head_width": (0, "vision.block: head_width=0: expected a whole number from 1 on"),
    "language.block.experts": (ExpertsConfig(number=2, chosen=3), "3 experts are chosen for a token, and there are 2"),
    "vision.block.mlp_width": (12.5, "vision.block: mlp_width=12.5: expected a whole number"),
    "language.window": ((4, None), "language: windows for 2 layers, and there are 3"),
    "language.positions.base": (1.0, r"positions.base=1.0 \(rope_theta\): expected a number above 1"),
    "language.positions.share": (0.1, "RoPE turns 0 of the 4 numbers of a head"),
    "vision.patch_size": (32, "vision: patch_size=32 and image_size=16: a patch is larger than the picture"),
    "vision.feature_layer": (-4, "vision: features of layer -4, and there are 2 layers"),
    "connector.kv_heads": (3, "connector: heads=2 and kv_heads=3: expected a multiple"),
    "fusion.offset": (2, "gated cross-attention in every 2th layer from layer 2 on, and there are 3 layers"),
}
WRONG_ROPES = {
    "dynamic": (rope(DynamicNtkScaling(factor=2.0, original_max_positions=8), share=0.5), "dynamic NTK scaling of 2 turned"),
    "llama3": (rope(Llama3Scaling(**LLAMA3, low_freq_factor=4.0, high_freq_factor=4.0)), "expected the second to be greater"),
    "yarn": (rope(YarnScaling(**YARN, beta_fast=1.0, beta_slow=2.0)), "beta_slow=2.0 and beta_fast=1.0"),
    "short": (rope(LongRopeScaling(**LONGROPE, short_factors=(1.0,), long_factors=(1.0, 2.0))), "1 short and 2 long factors"),
    "long": (rope(LongRopeScaling(**LONGROPE, short_factors=(1.0,) * 3, long_factors=(1.0,) * 3)), "expected 2, one for each"),
}


@pytest.mark.parametrize("path", WRONG)
def test_sizes_that_cannot_go_together(path):
    value, match = WRONG[path]
    check_consistent(tiny_model())
    with pytest.raises(ValueError, match=match):
        check_consistent(changed(tiny_model(), path, value))
    with pytest.raises(ValueError, match=r"^config: "):
        from_dict(RunConfig, to_dict(changed(tiny_run(), f"model.{path}", value)))


@pytest.mark.parametrize("name", WRONG_ROPES)
def test_positions_that_cannot_be(name):
    positions, match = WRONG_ROPES[name]
    with pytest.raises(ValueError, match=match):
        check_consistent(changed(tiny_model(), "language.positions", positions))


def test_a_share_of_an_odd_width_is_rounded_up():
    check_consistent(changed(tiny_model(), "language.positions", rope(share=0.25)))
    check_consistent(changed(tiny_model(), "language.positions", rope(share=0.9)))
