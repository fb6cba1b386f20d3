"""Language models."""

from __future__ import annotations

from typing import Literal

from vlm_jax.config.block import BlockConfig
from vlm_jax.config.frozen import frozen


@frozen
class LinearScaling:
    """Position interpolation (Chen et al. 2023)."""

    kind: Literal["linear"] = "linear"
    factor: float


@frozen
class Llama3Scaling:
    """The frequency-dependent scaling of LLaMA 3.1."""

    kind: Literal["llama3"] = "llama3"
    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_positions: int


@frozen
class RopeConfig:
    """Rotary position embedding (Su et al. 2021). Base and scaling have no default: a wrong guess is silent."""

    kind: Literal["rope"] = "rope"
    base: float
    scaling: LinearScaling | Llama3Scaling | None


@frozen
class LearnedPositionsConfig:
    kind: Literal["learned"] = "learned"
    offset: int = 0  # OPT's table starts two rows later


@frozen
class AlibiConfig:
    """Attention with linear biases (Press et al. 2022)."""

    kind: Literal["alibi"] = "alibi"
    max_bias: float = 8.0


@frozen
class DecoderConfig:
    """A decoder-only language model: LLaMA, Mistral, OPT, MPT and Gemma are settings of it."""

    kind: Literal["decoder"] = "decoder"
    vocab_size: int
    layers: int
    block: BlockConfig
    positions: RopeConfig | LearnedPositionsConfig | AlibiConfig
    max_positions: int
    window: int | None  # sliding-window attention: how many positions back, itself included; None: all
    tied_head: bool
    scale_embedding: bool = False  # Gemma multiplies embeddings by sqrt(width)
