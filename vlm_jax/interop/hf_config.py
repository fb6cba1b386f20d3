"""What the families' `config_from_hf` share: a transformers config's settings as ours, and refusals of what we do not have."""

from __future__ import annotations

from typing import Any

from vlm_jax.config import Activation, LinearScaling, Llama3Scaling, RopeConfig

ACTIVATIONS: dict[str, Activation] = {
    "gelu": "gelu",
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


def rope(config: Any) -> RopeConfig:
    """
    Raises:
      ValueError: a scaling that this library does not have.
    """
    values = config.rope_parameters
    match values.get("rope_type", "default"):
        case "default":
            scaling = None
        case "linear":
            scaling = LinearScaling(factor=float(values["factor"]))
        case "llama3":
            scaling = Llama3Scaling(
                factor=float(values["factor"]),
                low_freq_factor=float(values["low_freq_factor"]),
                high_freq_factor=float(values["high_freq_factor"]),
                original_max_positions=values["original_max_position_embeddings"],
            )
        case other:
            raise ValueError(f"{type(config).__name__}: RoPE scaling {other!r}; expected default, linear or llama3")
    if values.get("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError(
            f"{type(config).__name__}: partial_rotary_factor={values['partial_rotary_factor']}; only 1.0 is implemented"
        )
    return RopeConfig(base=float(values["rope_theta"]), scaling=scaling)
