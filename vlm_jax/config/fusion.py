"""Fusions: how the language model reads visual tokens."""

from __future__ import annotations

from typing import ClassVar, Literal

from vlm_jax.config.block import Activation, NormConfig
from vlm_jax.config.frozen import Kinds, frozen


@frozen
class FusionConfig(Kinds):
    """A fusion: how the language model reads visual tokens.

    Attributes of every kind:
      in_sequence: whether visual tokens stand in the sequence; else layers of cross-attention read them.
      prefix_lm: whether every token of a prompt sees all of it.
    """

    in_sequence: ClassVar[bool]


@frozen
class GatedCrossAttentionConfig(FusionConfig):
    """Flamingo's gated cross-attention dense layers (Alayrac et al. 2022, section 3.2).

    A gated block belongs to language layer `start + i` where `i % every == offset`: offset 0 is the paper's and IDEFICS's
    placement, `every - 1` OpenFlamingo's, and `every=layers, offset=layers // 2` the ablation's "single in the middle".

    With `place="within"` and `mlp_width=0` it is the ablation's "vanilla" cross-attention, and with `start` at the number of
    layers of a frozen language model, to which others are added, its "grafting" (table 3, iv).
    """

    kind: Literal["gated_cross_attention"] = "gated_cross_attention"
    in_sequence: ClassVar[bool] = False
    prefix_lm: ClassVar[bool] = False
    every: int
    offset: int
    start: int = 0  # the first language layer that may have one
    place: Literal["before", "within"] = "before"  # the language layer, or between its attention and its feed-forward
    gating: Literal["tanh", "none"] = "tanh"  # what is added is multiplied by tanh of a learned scalar, 0 at first
    heads: int
    head_width: int
    mlp_width: int  # 0: no feed-forward
    activation: Activation = "squared_relu"  # OpenFlamingo: gelu; IDEFICS: silu, gated
    gated_mlp: bool = False
    norm: NormConfig = NormConfig(kind="layer", eps=1e-5)
    qk_norm: bool = False  # IDEFICS
    # Which images a token sees. "all_previous_uniform" is OpenFlamingo's: text before the first image of its conversation looks
    # at all of the conversation's images, none more than another.
    media: Literal["last", "all_previous", "all_previous_uniform"] = "last"


@frozen
class InSequenceConfig(FusionConfig):
    """Visual tokens take the places of `<image>` tokens in the sequence (LLaVA, Liu et al. 2023)."""

    kind: Literal["in_sequence"] = "in_sequence"
    in_sequence: ClassVar[bool] = True
    newline: bool = False  # LLaVA-NeXT's learned token, which may stand anywhere between the visual ones
    prefix_lm: bool = False  # PaliGemma: pictures and prompt see all of themselves, only the answer is causal
