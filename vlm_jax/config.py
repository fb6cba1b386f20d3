"""Every size and choice of a model, a data set and a run, as frozen dataclasses.

A recipe in `configs/` returns `to_config_dict(RunConfig(...))` of `config_dict.py`; `train.py` lets the command line override
any leaf (`--config.optimizer.lr=3e-4`) and turns it back, refusing unknown names and wrong types.

Where a part can be one of several kinds, its dataclass has a `kind` field that tells them apart.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

Activation = Literal["gelu", "gelu_tanh", "quick_gelu", "relu", "squared_relu", "silu"]


def _frozen(cls):
    return dataclasses.dataclass(frozen=True, kw_only=True)(cls)


# --- Transformer blocks ------------------------------------------------------------------------------------------------


@_frozen
class NormConfig:
    """Layer normalisation (Ba et al. 2016) or RMSNorm (Zhang & Sennrich 2019)."""

    kind: Literal["layer", "rms"]
    eps: float
    bias: bool = True  # layer norm only; MPT has none
    plus_one: bool = False  # Gemma stores the scale minus one


@_frozen
class BlockConfig:
    """One pre-norm transformer block: attention and a feed-forward, each added to the stream.

    CLIP, LLaMA, Mistral, OPT, MPT and Gemma blocks are all settings of it.
    """

    width: int
    heads: int
    kv_heads: int  # fewer than `heads`: grouped-query attention (Ainslie et al. 2023)
    head_width: int
    mlp_width: int
    activation: Activation
    gated_mlp: bool  # SwiGLU / GeGLU (Shazeer 2020)
    norm: NormConfig
    qkv_bias: bool
    out_bias: bool
    mlp_bias: bool
    query_init: float = 1.0  # times LeCun's deviation: above 1, attention from scratch is choosy from its first step


# --- Vision encoders ---------------------------------------------------------------------------------------------------


@_frozen
class ClipVitConfig:
    """CLIP's vision transformer (Radford et al. 2021)."""

    kind: Literal["clip_vit"] = "clip_vit"
    image_size: int  # pixels of a side the positions are learned for
    patch_size: int
    layers: int
    block: BlockConfig
    feature_layer: int = -1  # which hidden state leaves: -1 the last, -2 the one before (LLaVA), 0 the embeddings
    post_norm: bool = True  # `post_layernorm` on the features; OpenFlamingo and LLaVA take them before it
    position_init: float | None = None  # deviation the positions start with; None: width ** -0.5, as CLIP's
    class_token: bool = False  # whether the class token is among the features
    mean: tuple[float, ...] = (0.48145466, 0.4578275, 0.40821073)  # of the pixels in 0..1
    std: tuple[float, ...] = (0.26862954, 0.26130258, 0.27577711)


# --- Connectors --------------------------------------------------------------------------------------------------------


@_frozen
class PerceiverConfig:
    """Flamingo's Perceiver resampler (Alayrac et al. 2022, section 3.1)."""

    kind: Literal["perceiver_resampler"] = "perceiver_resampler"
    latents: int
    layers: int
    heads: int
    head_width: int
    mlp_ratio: int = 4
    activation: Activation = "squared_relu"  # OpenFlamingo: gelu; IDEFICS: relu
    norm_eps: float = 1e-5
    qk_norm: bool = False  # IDEFICS
    time_embeddings: int = 0  # frames with a learned time embedding; 0: none (OpenFlamingo, IDEFICS)


# --- Fusions -----------------------------------------------------------------------------------------------------------


@_frozen
class GatedCrossAttentionConfig:
    """Flamingo's gated cross-attention dense layers (Alayrac et al. 2022, section 3.2).

    A gated block stands before language layer `i` where `i % every == offset`: offset 0 is the paper's and IDEFICS's
    placement, `every - 1` OpenFlamingo's, and `every=layers, offset=layers // 2` the ablation's "single in the middle".
    """

    kind: Literal["gated_cross_attention"] = "gated_cross_attention"
    every: int
    offset: int
    heads: int
    head_width: int
    mlp_width: int
    activation: Activation = "squared_relu"  # OpenFlamingo: gelu; IDEFICS: silu, gated
    gated_mlp: bool = False
    norm: NormConfig = NormConfig(kind="layer", eps=1e-5)
    qk_norm: bool = False  # IDEFICS
    media: Literal["last", "all_previous"] = "last"  # which images a token sees


# --- Language models ---------------------------------------------------------------------------------------------------


@_frozen
class LinearScaling:
    """Position interpolation (Chen et al. 2023)."""

    kind: Literal["linear"] = "linear"
    factor: float


@_frozen
class Llama3Scaling:
    """The frequency-dependent scaling of LLaMA 3.1."""

    kind: Literal["llama3"] = "llama3"
    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_positions: int


@_frozen
class RopeConfig:
    """Rotary position embedding (Su et al. 2021). Base and scaling have no default: a wrong guess is silent."""

    kind: Literal["rope"] = "rope"
    base: float
    scaling: LinearScaling | Llama3Scaling | None


@_frozen
class LearnedPositionsConfig:
    kind: Literal["learned"] = "learned"
    offset: int = 0  # OPT's table starts two rows later


@_frozen
class AlibiConfig:
    """Attention with linear biases (Press et al. 2022)."""

    kind: Literal["alibi"] = "alibi"
    max_bias: float = 8.0


@_frozen
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


@_frozen
class ModelConfig:
    """Four choices: vision encoder -> connector -> fusion -> language model."""

    vision: ClipVitConfig | None  # None: a language model alone
    connector: PerceiverConfig | None
    fusion: GatedCrossAttentionConfig | None
    language: DecoderConfig


# --- Data --------------------------------------------------------------------------------------------------------------


@_frozen
class EasyVqaConfig:
    kind: Literal["easy_vqa"] = "easy_vqa"
    cache_dir: str = "~/.cache/vlm_jax/tfds"  # where tensorflow-datasets keeps the prepared set


@_frozen
class JsonLinesConfig:
    """The user's own data: see `vlm_jax/data/jsonl.py` for the two formats of a line."""

    kind: Literal["jsonl"] = "jsonl"
    train: str
    eval: str
    image_root: str = ""  # "": pictures are looked for beside the JSON-lines file
    bad_lines: Literal["error", "skip"] = "error"  # skip: counted and reported


@_frozen
class AugmentConfig:
    flip: bool = False  # left-right and up-down, each with probability 1/2
    shift: int = 0  # up to so many pixels each way; the border is repeated
    colour: float = 0.0  # brightness and contrast by up to this share


@_frozen
class SampleRule:
    """How often a kind of sequence is trained on.

    The first rule whose `pattern` (a regex, searched in the sequence's text) matches counts.
    """

    pattern: str
    share: float  # above 0, at most 1: the chance of a matching sequence to be in an epoch


@_frozen
class DataConfig:
    source: EasyVqaConfig | JsonLinesConfig
    tokenizer: str  # "train": a byte-level BPE made from the training text; else a folder or a hub name
    vocab_size: int = 512  # of a trained tokenizer, at most
    prompt: str = "Question: {question} Answer:"  # one turn as the model reads it
    answer: str = " {answer}"
    image_size: int
    image_fit: Literal["stretch", "pad", "crop"] = "pad"
    sequences_per_image: int = 0  # at most so many questions share one packed picture, 0: all of an example's
    rows: int  # B, over the whole mesh
    tokens: int  # T of a row
    images: int  # M of a row
    frames: int = 1  # F of a slot
    sampling: tuple[SampleRule, ...] = ()  # of training; an evaluation takes every sequence
    augment: AugmentConfig = AugmentConfig()
    blank_images: bool = False  # the control experiment: every picture grey
    workers: int = 1  # processes that prepare batches ahead; 0: in the training process


# --- The run -----------------------------------------------------------------------------------------------------------


@_frozen
class ParamRule:
    """What happens to the parameters whose path matches `pattern` (a regex, searched). The first match counts."""

    pattern: str
    frozen: bool = False
    lr: float = 1.0  # times the schedule
    decay: float = 1.0  # times `weight_decay`
    rows_from: int = 0  # only rows from here on are trained (new tokens of an embedding)
    frozen_dtype: Literal["float32", "bfloat16"] = "float32"  # how a frozen parameter is held


@_frozen
class OptimizerConfig:
    """AdamW (Loshchilov & Hutter 2019) with warm-up."""

    lr: float
    warmup_steps: int
    schedule: Literal["cosine", "constant", "linear"] = "cosine"
    final_lr: float = 0.0  # share of `lr` at the end of cosine and linear
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip_norm: float = 1.0  # global gradient norm
    accumulate: int = 1  # micro-batches of an update
    rules: tuple[ParamRule, ...] = ()
    max_bad_steps: int = 10  # so many non-finite updates in a row stop the run


@_frozen
class MeshConfig:
    """Sizes of the mesh axes; one of them may be -1: what is left of the devices."""

    data: int = -1
    fsdp: int = 1
    tensor: int = 1


@_frozen
class RunConfig:
    model: ModelConfig
    data: DataConfig
    optimizer: OptimizerConfig
    mesh: MeshConfig = MeshConfig()
    seed: int = 0
    steps: int
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # of the computation; auto: bfloat16 on GPU and TPU
    remat: Literal["none", "dots", "full"] = "none"  # what the backward pass recomputes
    log_every: int = 20
    eval_every: int = 500
    eval_rows: int = 0  # rows of a held-out evaluation on the way; 0: all. The last evaluation is always whole
    save_every: int = 500
    keep_last: int = 2
    keep_best: int = 1
    init_from: str = ""  # a checkpoint to take the parameters from
