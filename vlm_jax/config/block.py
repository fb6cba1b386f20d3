"""Transformer blocks."""

from __future__ import annotations

from typing import Literal

from vlm_jax.config.frozen import frozen

Activation = Literal["gelu", "gelu_tanh", "quick_gelu", "relu", "squared_relu", "silu"]


@frozen
class NormConfig:
    """Layer normalisation (Ba et al. 2016) or RMSNorm (Zhang & Sennrich 2019)."""

    kind: Literal["layer", "rms"]
    eps: float
    bias: bool = True  # layer norm only; MPT has none
    plus_one: bool = False  # Gemma stores the scale minus one


@frozen
class ExpertsConfig:
    """Several feed-forwards of which a router chooses some for each token (Shazeer et al. 2017)."""

    number: int
    chosen: int  # for a token


@frozen
class BlockConfig:
    """One transformer block: attention and a feed-forward, each added to the stream, each with a norm in front.

    CLIP, DINOv2, LLaMA, Mistral, Mixtral, Qwen2, GPT-NeoX, Phi, StableLM, OPT, MPT and Gemma blocks are all settings of it.
    """

    width: int
    heads: int
    kv_heads: int  # fewer than `heads`: grouped-query attention (Ainslie et al. 2023)
    head_width: int
    mlp_width: int  # of every expert, where there are several
    activation: Activation
    gated_mlp: bool  # SwiGLU / GeGLU (Shazeer 2020)
    norm: NormConfig
    qkv_bias: bool
    out_bias: bool
    mlp_bias: bool
    parallel_residual: bool = False  # attention and feed-forward read the same input (GPT-NeoX)
    shared_norm: bool = False  # and the same norm of it (Phi)
    post_norm: bool = False  # the norms stand behind the sums instead (Vaswani et al. 2017; OPT-350M)
    experts: ExpertsConfig | None = None  # Mixtral
    layer_scale: bool = False  # a learned factor for what each half adds (Touvron et al. 2021; DINOv2)
    qk_norm: bool = False  # `norm` of the queries and of the keys too, over all heads at once (MPT-1B)
    query_init: float = 1.0  # times LeCun's standard deviation: above 1, untrained attention starts out peaked
