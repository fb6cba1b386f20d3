"""What the families' `config_from_hf` share: settings of a transformers config as ours, and checks for unsupported settings."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from vlm_jax.config import (
    Activation,
    BlockConfig,
    DecoderConfig,
    DynamicNtkScaling,
    LinearScaling,
    Llama3Scaling,
    LongRopeScaling,
    NormConfig,
    PositionsConfig,
    RopeConfig,
    YarnScaling,
)

ACTIVATIONS: dict[str, Activation] = {
    "gelu": "gelu",
    "gelu_fast": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "quick_gelu": "quick_gelu",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
}


def activation(name: str) -> Activation:
    """
    Raises:
      ValueError: an activation that this library does not have.
    """
    if name not in ACTIVATIONS:
        raise ValueError(f"activation {name!r}: expected one of {sorted(ACTIVATIONS)}; add it to ops/activations.py")
    return ACTIVATIONS[name]


def require(config: Any, **values: Any) -> None:
    """Refuses a config with a setting that our model would silently ignore.

    Raises:
      ValueError: each setting with another value; one that is absent passes.
    """
    wrong = [
        f"{name}={getattr(config, name)!r} (only {value!r} is implemented)"
        for name, value in values.items()
        if getattr(config, name, value) != value
    ]
    if wrong:
        raise ValueError(f"{type(config).__name__}: {'; '.join(wrong)}")


def plain_block(config: Any, **changes: Any) -> BlockConfig:
    """A layer with layer norms, biases, and a feed-forward of two maps, as the vision towers and GPT-NeoX name its sizes."""
    sizes = dict(
        width=config.hidden_size,
        heads=config.num_attention_heads,
        kv_heads=config.num_attention_heads,
        head_width=config.hidden_size // config.num_attention_heads,
        gated_mlp=False,
        norm=NormConfig(kind="layer", eps=config.layer_norm_eps),
        qkv_bias=True,
        out_bias=True,
        mlp_bias=True,
    )
    if "mlp_width" not in changes:
        sizes["mlp_width"] = config.intermediate_size
    if "activation" not in changes:
        sizes["activation"] = activation(config.hidden_act)
    return BlockConfig(**sizes | changes)


def plain_decoder(config: Any, block: BlockConfig, positions: PositionsConfig, **changes: Any) -> DecoderConfig:
    """A decoder whose sizes have the names that most of transformers' language models give them."""
    sizes = dict(
        vocab_size=config.vocab_size,
        layers=config.num_hidden_layers,
        max_positions=max_positions(config, positions),
        window=None,
        tied_head=config.tie_word_embeddings,
    )
    return DecoderConfig(block=block, positions=positions, **sizes | changes)


def max_positions(config: Any, positions: PositionsConfig) -> int | None:
    """`max_position_embeddings`; None, so any number, with dynamic NTK, whose purpose is to go beyond them."""
    dynamic = isinstance(getattr(positions, "scaling", None), DynamicNtkScaling)
    return None if dynamic else config.max_position_embeddings


def squares(config: Any) -> dict[str, int]:
    """The sizes of pictures and patches of any vision config.

    Raises:
      ValueError: they are not square, or not of three colours.
    """
    require(config, num_channels=3)
    sizes = {}
    for name in ("image_size", "patch_size"):
        sizes[name] = getattr(config, name)
        if not isinstance(sizes[name], int):
            raise ValueError(f"{type(config).__name__}: {name}={sizes[name]}; only squares (one number) are implemented")
    return sizes


def rope(config: Any) -> RopeConfig:
    """
    Raises:
      ValueError: a scaling that this library does not have, or several.
    """
    values = config.rope_parameters
    if "rope_theta" not in values:
        raise ValueError(
            f"{type(config).__name__}: RoPE of its own for each of {sorted(values)}; only one for all is implemented"
        )
    kind = values.get("rope_type", "default")
    if kind not in SCALINGS:
        raise ValueError(f"{type(config).__name__}: RoPE scaling {kind!r}; expected one of {sorted(SCALINGS)}")
    if kind in ("linear", "llama3", "dynamic") and values["factor"] is None:
        raise ValueError(f"{type(config).__name__}: RoPE scaling {kind!r} without a factor")
    scaling = SCALINGS[kind](values, config.max_position_embeddings)
    return RopeConfig(base=float(values["rope_theta"]), scaling=scaling, share=values.get("partial_rotary_factor") or 1.0)


# A scaling's `rope_parameters` and the model's `max_position_embeddings` -> ours.


def _linear(values: dict[str, Any], longest: int) -> LinearScaling:
    return LinearScaling(factor=float(values["factor"]))


def _llama3(values: dict[str, Any], longest: int) -> Llama3Scaling:
    return Llama3Scaling(
        factor=float(values["factor"]),
        low_freq_factor=float(values["low_freq_factor"]),
        high_freq_factor=float(values["high_freq_factor"]),
        original_max_positions=values["original_max_position_embeddings"],
    )


def _dynamic(values: dict[str, Any], longest: int) -> DynamicNtkScaling:
    return DynamicNtkScaling(factor=float(values["factor"]), original_max_positions=longest)


def _yarn(values: dict[str, Any], longest: int) -> YarnScaling:
    original = values["original_max_position_embeddings"]
    factor = float(values["factor"] or longest / original)
    attention = values.get("attention_factor")
    if attention is None:
        of = lambda scale: 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0
        scale, scale_all = values.get("mscale"), values.get("mscale_all_dim")
        attention = of(scale) / of(scale_all) if scale and scale_all else of(1.0)
    return YarnScaling(
        factor=factor,
        original_max_positions=original,
        attention_factor=float(attention),
        beta_fast=float(values.get("beta_fast") or 32),
        beta_slow=float(values.get("beta_slow") or 1),
        truncate=values.get("truncate", True),
    )


def _longrope(values: dict[str, Any], longest: int) -> LongRopeScaling:
    original = values["original_max_position_embeddings"]
    factor = values.get("factor") or longest / original
    attention = values.get("attention_factor")
    if attention is None:
        attention = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
    return LongRopeScaling(
        short_factors=tuple(map(float, values["short_factor"])),
        long_factors=tuple(map(float, values["long_factor"])),
        original_max_positions=original,
        attention_factor=float(attention),
    )


SCALINGS: dict[str, Callable[[dict[str, Any], int], Any]] = {
    "default": lambda values, longest: None,
    "linear": _linear,
    "llama3": _llama3,
    "dynamic": _dynamic,
    "yarn": _yarn,
    "longrope": _longrope,
}
