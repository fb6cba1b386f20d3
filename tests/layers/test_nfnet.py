"""NFNet against timm, with random weights: all features where timm is installed, and some numbers that timm gave."""

import dataclasses
import importlib.abc
import importlib.machinery
import math
import sys
import types
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from vlm_jax.config import NfnetConfig
from vlm_jax.layers.nfnet import Nfnet
from vlm_jax.models.sizes import vision
from vlm_jax.paths import by_path, nested
from vlm_jax.sharding import boxed_params, unboxed

TINY = NfnetConfig(image_size=72, depths=(1, 3, 2, 1), channels=(256, 256, 512, 256), stem_width=16, final_width=64)


def count(name):
    module = Nfnet(vision(name), jnp.float32)
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(unboxed(boxed_params(module))))


# timm's dm_nfnet_f0 and dm_nfnet_f6 without their classifier.
@pytest.mark.parametrize(("name", "parameters"), [("nfnet-f0", 68_416_284), ("nfnet-f6", 435_286_116)])
def test_parameters(name, parameters):
    assert count(name) == parameters


def random_weights():
    """As of a trained net: gains away from 1, biases away from 0."""
    rng = np.random.default_rng(0)
    shapes = {path: leaf.shape for path, leaf in by_path(unboxed(boxed_params(Nfnet(TINY, jnp.float32)))).items()}
    draw = lambda shape: (0.3 + 0.5 * rng.standard_normal(shape)).astype(np.float32)
    return nested({path: draw(shape) for path, shape in sorted(shapes.items())})


@pytest.fixture(scope="module")
def features():
    """(pictures, weights, what ours are)."""
    images = np.random.default_rng(1).integers(0, 256, (2, 72, 72, 3), np.uint8)
    params = random_weights()
    return images, params, np.asarray(jax.jit(Nfnet(TINY, jnp.float32).apply)({"params": params}, images))


GOLDEN = [0.5562684, 0.8004653, -0.002793826, 0.1360791, 0.9256278, 1.3154242]  # mean, deviation, some features


def test_features_have_the_numbers_that_timm_gave(features):
    """Blocks alone and in a scan, pictures whose halves are odd, squeeze-and-excitation, groups; from timm 1.0.30."""
    ours = features[2]
    assert ours.shape == (2, TINY.frame_features, TINY.width) and TINY.frame_features == 9
    np.testing.assert_allclose([ours.mean(), ours.std(), *ours[1, 4, :4]], GOLDEN, rtol=1e-4, atol=1e-6)


CONVOLUTIONS = {"narrow": "conv1", "mix_0": "conv2", "mix_1": "conv2b", "wide": "conv3", "shortcut": "downsample.conv"}


def to_timm(params):
    """Our parameters -> timm's state."""
    state = {}

    def conv(name, ours):
        state[f"{name}.weight"] = ours["kernel"].transpose(3, 2, 0, 1)
        state[f"{name}.gain"], state[f"{name}.bias"] = ours["gain"].reshape(-1, 1, 1, 1), ours["bias"]

    def block(name, ours):
        for part in CONVOLUTIONS.keys() & ours.keys():
            conv(f"{name}.{CONVOLUTIONS[part]}", ours[part])
        for part, theirs in (("down", "fc1"), ("up", "fc2")):
            state[f"{name}.attn_last.{theirs}.weight"] = ours["squeeze"][part]["kernel"].T[:, :, None, None]
            state[f"{name}.attn_last.{theirs}.bias"] = ours["squeeze"][part]["bias"]
        state[f"{name}.skipinit_gain"] = ours["gain"]

    for number in range(4):
        conv(f"stem.conv{number + 1}", params[f"stem_{number}"])
    conv("final_conv", params["final"])
    for stage, depth in enumerate(TINY.depths):
        block(f"stages.{stage}.0", params[f"stage_{stage}_first"])
        for number in range(1, depth):
            block(f"stages.{stage}.{number}", jax.tree.map(lambda leaf, at=number - 1: leaf[at], params[f"stage_{stage}"]))
    return {name: torch.tensor(np.asarray(leaf)) for name, leaf in state.items()}


class Torchvision(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Stands for torchvision while timm is imported, which wants it for what is not used here."""

    def find_spec(self, name, path=None, target=None):
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if name.split(".")[0] == "torchvision" else None

    def create_module(self, spec):
        module = types.ModuleType(spec.name)
        module.__getattr__ = lambda name: mock.MagicMock(name=name)
        return module

    def exec_module(self, module):
        pass


def timm_nfnet():
    """timm's module, where it is installed."""
    finder = Torchvision()
    sys.meta_path.insert(0, finder)
    try:
        return importlib.import_module("timm.models.nfnet")
    except ImportError as error:
        pytest.skip(f"timm: {error}")
    finally:
        sys.meta_path.remove(finder)
        for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
            del sys.modules[name]


def test_features_equal_those_of_timm(features):
    nfnet, (images, params, ours) = timm_nfnet(), features
    settings = dict(depths=TINY.depths, channels=TINY.channels)
    theirs = dataclasses.replace(nfnet._dm_nfnet_cfg(**settings), stem_chs=TINY.stem_width, num_features=TINY.final_width)
    model = nfnet.NormFreeNet(theirs, num_classes=0).eval()
    model.load_state_dict(to_timm(params))
    pixels = (images / 255.0 - np.array(TINY.mean)) / np.array(TINY.std)
    with torch.no_grad():
        expected = model.forward_features(torch.tensor(pixels.transpose(0, 3, 1, 2), dtype=torch.float32)).numpy()
    expected = expected.transpose(0, 2, 3, 1).reshape(ours.shape)
    np.testing.assert_allclose(ours, expected, atol=1e-4 * np.abs(expected).max())
