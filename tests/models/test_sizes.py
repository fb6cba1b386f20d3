"""Parameter counts of published models, from shapes alone."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import pytest

from vlm_jax.config import (
    AlibiConfig,
    BlockConfig,
    DecoderConfig,
    GatedCrossAttentionConfig,
    LearnedPositionsConfig,
    NormConfig,
    PerceiverConfig,
    RopeConfig,
    VitConfig,
)
from vlm_jax.layers.decoder import Decoder
from vlm_jax.layers.gated_cross_attention import GatedCrossAttention
from vlm_jax.layers.perceiver import PerceiverResampler
from vlm_jax.layers.stack import LanguageInputs
from vlm_jax.layers.vit import Vit

LAYER, RMS = NormConfig(kind="layer", eps=1e-5), NormConfig(kind="rms", eps=1e-6)
ROPE = RopeConfig(base=10_000.0, scaling=None)


def count(module, *args, **kwargs):
    params = jax.eval_shape(lambda key: module.init(key, *args, **kwargs), jax.random.key(0))["params"]
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))


def block(width, heads, mlp_width, *, kv_heads=None, head_width=None, gated=False, norm=LAYER, bias=True):
    return BlockConfig(
        width=width,
        heads=heads,
        kv_heads=kv_heads or heads,
        head_width=head_width or width // heads,
        mlp_width=mlp_width,
        activation="gelu",
        gated_mlp=gated,
        norm=norm,
        qkv_bias=bias,
        out_bias=bias,
        mlp_bias=bias,
    )


def decoder(vocab_size, layers, block, positions=ROPE, max_positions=2048, tied_head=False):
    return DecoderConfig(
        vocab_size=vocab_size,
        layers=layers,
        block=block,
        positions=positions,
        max_positions=max_positions,
        window=None,
        tied_head=tied_head,
    )


LANGUAGE_MODELS = {
    "llama-7b": (6_738_415_616, decoder(32_000, 32, block(4096, 32, 11_008, gated=True, norm=RMS, bias=False))),
    "mistral-7b-v0.1": (
        7_241_732_096,
        decoder(32_000, 32, block(4096, 32, 14_336, kv_heads=8, gated=True, norm=RMS, bias=False)),
    ),
    "gemma-2b": (
        2_506_172_416,
        decoder(
            256_000,
            18,
            block(2048, 8, 16_384, kv_heads=1, head_width=256, gated=True, norm=RMS, bias=False),
            tied_head=True,
        ),
    ),
    "opt-125m": (125_239_296, decoder(50_272, 12, block(768, 12, 3072), LearnedPositionsConfig(offset=2), tied_head=True)),
    "mpt-7b": (
        6_649_286_656,
        decoder(
            50_432,
            32,
            block(4096, 32, 16_384, norm=dataclasses.replace(LAYER, bias=False), bias=False),
            AlibiConfig(),
            tied_head=True,
        ),
    ),
}


@pytest.mark.parametrize("name", LANGUAGE_MODELS)
def test_language_models(name):
    published, config = LANGUAGE_MODELS[name]
    tokens = jnp.zeros((1, 1), jnp.int32)

    def whole(module):
        return module.head(module(LanguageInputs(module.embed(tokens)), tokens, tokens)[0])

    params = jax.eval_shape(lambda key: Decoder(config, jnp.float32).init(key, method=whole), jax.random.key(0))["params"]
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params)) == published


def test_clip_vit_large_14_336():
    config = VitConfig(image_size=336, patch_size=14, layers=24, block=block(1024, 16, 4096))
    images = jnp.zeros((1, 336, 336, 3), jnp.uint8)
    assert count(Vit(config, jnp.float32), images) == 303_507_456
    without = Vit(dataclasses.replace(config, post_norm="none"), jnp.float32)
    assert count(without, images) == 303_507_456 - 2 * 1024


def test_openflamingos_resampler():
    config = PerceiverConfig(latents=64, layers=6, heads=8, head_width=64, activation="gelu")
    module = PerceiverResampler(config, 1024, jnp.float32)
    assert count(module, jnp.zeros((1, 1, 1, 256, 1024)), jnp.ones((1, 1), jnp.int32)) == 63_019_008


def gated_layers(width, layers, every, offset, heads, head_width, visual_width):
    """Parameters of all gated layers of a language model, and how many layers they are."""
    config = GatedCrossAttentionConfig(every=every, offset=offset, heads=heads, head_width=head_width, mlp_width=4 * width)
    language = decoder(8, layers, block(width, heads, 4 * width))
    media, visual = jnp.zeros((1, 1), jnp.int32), jnp.zeros((1, 1, 1, visual_width))
    gated = GatedCrossAttention(config, language, visual_width, jnp.float32)
    total = count(gated, media, media, visual=visual, method="interleaved")
    return total, len(range(offset, layers, every))


@pytest.mark.parametrize(
    ("width", "layers", "every", "one", "total"),
    [
        (2048, 24, 1, 36_708_354, 881_000_496),
        (2560, 32, 2, 56_109_058, 897_744_928),
        (4096, 32, 4, 139_476_994, 1_115_815_952),
    ],
    ids=["3B", "4B", "9B"],
)
def test_openflamingos_gated_layers(width, layers, every, one, total):
    parameters, blocks = gated_layers(width, layers, every, every - 1, 8, 64, visual_width=1024)
    assert (parameters, parameters // blocks) == (total, one)


@pytest.mark.parametrize(
    ("width", "layers", "every", "heads", "published"),
    [(2048, 24, 1, 16, 1.2e9), (4096, 32, 4, 32, 1.6e9), (8192, 80, 7, 64, 10e9)],
    ids=["3B", "9B", "80B"],
)
def test_flamingos_gated_layers(width, layers, every, heads, published):
    # Table 5 follows from visual tokens as wide as the language model, and for 9B from its 32 layers, not Table 4's 40.
    parameters, _ = gated_layers(width, layers, every, 0, heads, 128, visual_width=width)
    assert parameters == pytest.approx(published, rel=0.05)
