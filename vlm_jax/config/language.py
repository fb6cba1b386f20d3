"""Language models."""

from __future__ import annotations

from typing import ClassVar, Literal

from vlm_jax.config.block import BlockConfig
from vlm_jax.config.frozen import Kinds, frozen


@frozen
class ScalingConfig(Kinds):
    """Scaling of rotary positions beyond the context length of training."""

    by_length: ClassVar[bool] = False  # whether a position is rotated by more or less as its sequence is longer


@frozen
class LinearScaling(ScalingConfig):
    """Position interpolation (Chen et al. 2023)."""

    kind: Literal["linear"] = "linear"
    factor: float


@frozen
class Llama3Scaling(ScalingConfig):
    """The frequency-dependent scaling of LLaMA 3.1."""

    kind: Literal["llama3"] = "llama3"
    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_positions: int


@frozen
class DynamicNtkScaling(ScalingConfig):
    """A base that grows with the sequence once it is longer than the model was trained for (bloc97, emozilla 2023).

    So sequences of any length are read; `ops.rotary.rotary_angles` says which length counts.
    """

    kind: Literal["dynamic"] = "dynamic"
    by_length: ClassVar[bool] = True
    factor: float
    original_max_positions: int


@frozen
class YarnScaling(ScalingConfig):
    """YaRN (Peng et al. 2023): each frequency by how often it turns within the original context."""

    kind: Literal["yarn"] = "yarn"
    factor: float
    original_max_positions: int
    attention_factor: float  # times cosine and sine
    beta_fast: float = 32.0  # from so many turns on a frequency is kept
    beta_slow: float = 1.0  # up to so many it is divided by `factor`
    truncate: bool = True  # the range between the two begins and ends at whole frequencies


@frozen
class LongRopeScaling(ScalingConfig):
    """LongRoPE (Ding et al. 2024): a divisor of its own for every frequency, others once the sequence is long."""

    kind: Literal["longrope"] = "longrope"
    by_length: ClassVar[bool] = True
    short_factors: tuple[float, ...]
    long_factors: tuple[float, ...]  # of a sequence longer than `original_max_positions`
    original_max_positions: int
    attention_factor: float  # times cosine and sine


@frozen
class PositionsConfig(Kinds):
    """The position encoding of a language model."""

    by_length: ClassVar[bool] = False  # see `ScalingConfig`


@frozen
class RopeConfig(PositionsConfig):
    """Rotary position embedding (Su et al. 2021). Base and scaling have no default: a wrong guess is silent."""

    kind: Literal["rope"] = "rope"
    base: float
    scaling: ScalingConfig | None
    share: float = 1.0  # of the head width, from its front, that is turned (GPT-NeoX's `rotary_pct`)

    @property
    def by_length(self) -> bool:
        return self.scaling is not None and self.scaling.by_length


@frozen
class LearnedPositionsConfig(PositionsConfig):
    kind: Literal["learned"] = "learned"
    offset: int = 0  # OPT's table starts two rows later


@frozen
class AlibiConfig(PositionsConfig):
    """Attention with linear biases (Press et al. 2022)."""

    kind: Literal["alibi"] = "alibi"
    max_bias: float = 8.0


@frozen
class LanguageConfig(Kinds):
    """A language model.

    Attributes of every kind:
      vocab_size; max_positions: tokens it reads, its answer included; None: any number.
      width: of the embeddings, and of what may stand in their places; layers: how many a fusion may stand between.
    """


@frozen
class DecoderConfig(LanguageConfig):
    """A decoder-only language model: LLaMA, Mistral, Mixtral, Qwen2, GPT-NeoX, OPT, MPT and Gemma are settings of it.

    Read both ways, as a text tower may (`TextTowerConfig.causal`), BERT is one too.
    """

    kind: Literal["decoder"] = "decoder"
    vocab_size: int
    layers: int
    block: BlockConfig
    positions: PositionsConfig
    max_positions: int | None
    # Sliding-window attention: how many positions back, itself included; None: all. One for all layers, or one for each.
    window: int | tuple[int | None, ...] | None
    tied_head: bool
    head_bias: bool = False  # Phi
    scale_embedding: bool = False  # Gemma multiplies embeddings by sqrt(width)
    # Of the embedding and the head, with a linear map between each of them and the layers; None: as the layers (OPT-350M).
    embedding_width: int | None = None
    final_norm: bool = True  # behind the last layer
    embedding_norm: bool = False  # behind the sum of embeddings and positions (BERT)
    token_types: int = 0  # rows of an embedding of token types, of which every token has the first (BERT)

    @property
    def width(self) -> int:
        return self.block.width
