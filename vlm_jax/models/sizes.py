"""Published sizes by name: `vision("clip-l/14-336")`, `language("vicuna-7b")`.

A recipe takes one and changes what differs, as a vision encoder's `feature_layer`, with `dataclasses.replace`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from vlm_jax.config import (
    Activation,
    AlibiConfig,
    BlockConfig,
    DecoderConfig,
    ExpertsConfig,
    LanguageConfig,
    LearnedPositionsConfig,
    NfnetConfig,
    NormConfig,
    RopeConfig,
    VisionConfig,
    VitConfig,
)
from vlm_jax.config.register import Register

VISION: Register[Callable[[], VisionConfig]] = Register("a vision encoder of the size")
LANGUAGE: Register[Callable[[], LanguageConfig]] = Register("a language model of the size")


def vision(name: str) -> VisionConfig:
    """
    Raises:
      RegisterError: an unknown name; the message lists those that are known.
    """
    return VISION[name]()


def language(name: str) -> LanguageConfig:
    """
    Raises:
      RegisterError: an unknown name; the message lists those that are known.
    """
    return LANGUAGE[name]()


def _block(width: int, heads: int, mlp_width: int, **changes: Any) -> BlockConfig:
    """With layer norms and biases; of LLaMA's kind with `**_bare(eps)`."""
    plain = dict(
        kv_heads=heads,
        head_width=width // heads,
        activation="gelu",
        gated_mlp=False,
        norm=NormConfig(kind="layer", eps=1e-5),
        qkv_bias=True,
        out_bias=True,
        mlp_bias=True,
    )
    return BlockConfig(width=width, heads=heads, mlp_width=mlp_width, **plain | changes)


def _bare(eps: float, **changes: Any) -> dict[str, Any]:
    """A LLaMA-style block: RMSNorm, SwiGLU, no biases."""
    return (
        dict(
            activation="silu",
            gated_mlp=True,
            norm=NormConfig(kind="rms", eps=eps),
            qkv_bias=False,
            out_bias=False,
            mlp_bias=False,
        )
        | changes
    )


def _decoder(vocab_size: int, layers: int, block: BlockConfig, max_positions: int, **changes: Any) -> DecoderConfig:
    plain = dict(positions=RopeConfig(base=10_000.0, scaling=None), window=None, tied_head=False)
    return DecoderConfig(vocab_size=vocab_size, layers=layers, block=block, max_positions=max_positions, **plain | changes)


HALF = (0.5, 0.5, 0.5)
_CLIP_B, _CLIP_L, _CLIP_H = ((768, 12, 3072), 12), ((1024, 16, 4096), 24), ((1280, 16, 5120), 32)
_SO400M = ((1152, 16, 4304), 27)


def _clip(
    size: tuple[tuple[int, int, int], int], side: int, patch: int, activation: Activation = "quick_gelu"
) -> Callable[[], VitConfig]:
    block, layers = size
    return lambda: VitConfig(
        image_size=side,
        patch_size=patch,
        layers=layers,
        block=_block(*block, activation=activation),
        class_token="kept",
    )


def _siglip(size: tuple[tuple[int, int, int], int], side: int, patch: int) -> Callable[[], VitConfig]:
    block, layers = size
    return lambda: VitConfig(
        image_size=side,
        patch_size=patch,
        layers=layers,
        block=_block(*block, activation="gelu_tanh", norm=NormConfig(kind="layer", eps=1e-6)),
        class_token="none",
        patch_bias=True,
        pre_norm=False,
        mean=HALF,
        std=HALF,
    )


VISION.add("clip-b/32")(_clip(_CLIP_B, 224, 32))
VISION.add("clip-l/14")(_clip(_CLIP_L, 224, 14))
VISION.add("clip-l/14-336")(_clip(_CLIP_L, 336, 14))
VISION.add("clip-h/14")(_clip(_CLIP_H, 224, 14, "gelu"))  # LAION's
VISION.add("siglip-b/16")(_siglip(_CLIP_B, 224, 16))
VISION.add("siglip-so400m/14")(_siglip(_SO400M, 224, 14))
VISION.add("siglip-so400m/14-384")(_siglip(_SO400M, 384, 14))
VISION.add("siglip-so400m/14-980")(_siglip(_SO400M, 980, 14))


def nfnet(depth: int, side: int) -> NfnetConfig:
    """NFNet-F(`depth` - 1) (Brock et al. 2021) for pictures of `side` pixels: every stage is `depth` times as deep as F0's."""
    return NfnetConfig(image_size=side, depths=tuple(depth * blocks for blocks in (1, 2, 6, 3)))


VISION.add("nfnet-f0")(lambda: nfnet(1, 256))
VISION.add("nfnet-f6")(lambda: nfnet(7, 576))

_llama = lambda vocabulary, layers, sizes, longest, eps=1e-6, **changes: (
    lambda: _decoder(vocabulary, layers, _block(*sizes, **_bare(eps)), longest, **changes)
)
_grouped = lambda vocabulary, layers, sizes, kv_heads, longest, eps, **changes: (
    lambda: _decoder(vocabulary, layers, _block(*sizes, **_bare(eps, kv_heads=kv_heads)), longest, **changes)
)
LANGUAGE.add("vicuna-7b")(_llama(32_000, 32, (4096, 32, 11_008), 4096, eps=1e-5))
LANGUAGE.add("vicuna-13b")(_llama(32_000, 40, (5120, 40, 13_824), 4096, eps=1e-5))
LANGUAGE.add("llama-7b")(_llama(32_000, 32, (4096, 32, 11_008), 2048))
LANGUAGE.add("llama-65b")(_llama(32_000, 80, (8192, 64, 22_016), 2048))
LANGUAGE.add("yi-34b")(
    _grouped(64_000, 60, (7168, 56, 20_480), 8, 4096, 1e-5, positions=RopeConfig(base=5_000_000.0, scaling=None))
)
LANGUAGE.add("llama-3-8b")(
    _grouped(128_256, 32, (4096, 32, 14_336), 8, 8192, 1e-5, positions=RopeConfig(base=500_000.0, scaling=None))
)
LANGUAGE.add("mistral-7b")(_grouped(32_000, 32, (4096, 32, 14_336), 8, 32_768, 1e-5, window=4096))


@LANGUAGE.add("mixtral-8x7b")
def _mixtral() -> DecoderConfig:
    block = _block(4096, 32, 14_336, **_bare(1e-5, kv_heads=8, experts=ExpertsConfig(number=8, chosen=2)))
    return _decoder(32_000, 32, block, 32_768, positions=RopeConfig(base=1_000_000.0, scaling=None))


@LANGUAGE.add("gemma-2b")
def _gemma() -> DecoderConfig:
    norm = NormConfig(kind="rms", eps=1e-6, plus_one=True)
    block = _block(2048, 8, 16_384, **_bare(1e-6, kv_heads=1, head_width=256, activation="gelu_tanh", norm=norm))
    return _decoder(256_000, 18, block, 8192, tied_head=True, scale_embedding=True)


def _chinchilla(width: int, layers: int, heads: int) -> Callable[[], DecoderConfig]:
    """Chinchilla's kind (Hoffmann et al. 2022) as Flamingo's table 4 has it: RMS norms, GELU, 32,000 tokens, a tied head.

    Its relative positions (Dai et al. 2019), an eighth of an attention's parameters, are rotary ones here.
    """
    bare = dict(norm=NormConfig(kind="rms", eps=1e-6), qkv_bias=False, out_bias=False, mlp_bias=False)
    return lambda: _decoder(32_000, layers, _block(width, heads, 4 * width, **bare), 2048, tied_head=True)


LANGUAGE.add("chinchilla-1.4b")(_chinchilla(2048, 24, 16))
LANGUAGE.add("chinchilla-7b")(_chinchilla(4096, 32, 32))
LANGUAGE.add("chinchilla-70b")(_chinchilla(8192, 80, 64))


def _opt(width: int, layers: int, heads: int) -> Callable[[], DecoderConfig]:
    block = lambda: _block(width, heads, 4 * width, activation="relu")
    positions = LearnedPositionsConfig(offset=2)
    return lambda: _decoder(50_272, layers, block(), 2048, positions=positions, tied_head=True)


def _opt_350m() -> DecoderConfig:
    """The only OPT with its norms behind the sums, and with embeddings narrower than its layers."""
    plain = _opt(1024, 24, 16)()
    block = dataclasses.replace(plain.block, post_norm=True)
    return dataclasses.replace(plain, block=block, embedding_width=512, final_norm=False)


LANGUAGE.add("opt-125m")(_opt(768, 12, 12))
LANGUAGE.add("opt-350m")(_opt_350m)
LANGUAGE.add("opt-1.3b")(_opt(2048, 24, 32))
LANGUAGE.add("opt-2.7b")(_opt(2560, 32, 32))
LANGUAGE.add("opt-6.7b")(_opt(4096, 32, 32))


def _mpt(vocabulary: int, width: int, layers: int, heads: int, **changes: Any) -> Callable[[], DecoderConfig]:
    bare = dict(norm=NormConfig(kind="layer", eps=1e-5, bias=False), qkv_bias=False, out_bias=False, mlp_bias=False)
    block = lambda: _block(width, heads, 4 * width, **bare | changes)
    return lambda: _decoder(vocabulary, layers, block(), 2048, positions=AlibiConfig(), tied_head=True)


LANGUAGE.add("mpt-1b")(_mpt(50_368, 2048, 24, 16, qk_norm=True))
LANGUAGE.add("mpt-7b")(_mpt(50_432, 4096, 32, 32))


def _neox(width: int, layers: int, heads: int, vocabulary: int, share: float, parallel: bool) -> Callable[[], DecoderConfig]:
    block = lambda: _block(width, heads, 4 * width, parallel_residual=parallel)
    positions = RopeConfig(base=10_000.0, scaling=None, share=share)
    return lambda: _decoder(vocabulary, layers, block(), 2048, positions=positions)


LANGUAGE.add("pythia-2.8b")(_neox(2560, 32, 32, 50_304, 0.25, parallel=True))
LANGUAGE.add("redpajama-3b")(_neox(2560, 32, 32, 50_432, 1.0, parallel=False))


@LANGUAGE.add("phi-2")
def _phi() -> DecoderConfig:
    block = _block(2560, 32, 10_240, activation="gelu_tanh", parallel_residual=True, shared_norm=True)
    positions = RopeConfig(base=10_000.0, scaling=None, share=0.4)
    return _decoder(51_200, 32, block, 2048, positions=positions, head_bias=True)


@LANGUAGE.add("stablelm-1.6b")
def _stablelm() -> DecoderConfig:
    block = _block(2048, 32, 5632, activation="silu", gated_mlp=True, out_bias=False, mlp_bias=False)
    positions = RopeConfig(base=10_000.0, scaling=None, share=0.25)
    return _decoder(100_352, 24, block, 4096, positions=positions)
