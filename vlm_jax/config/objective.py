"""Objectives: what is learned from a batch."""

from __future__ import annotations

from typing import Literal

from vlm_jax.config.frozen import Kinds, frozen


@frozen
class ObjectiveConfig(Kinds):
    """The training objective."""


@frozen
class NextTokenConfig(ObjectiveConfig):
    """The cross-entropy of every learned token."""

    kind: Literal["next_token"] = "next_token"
    # Float32 logits that a device holds at once; of more, head and loss are computed by chunks of tokens, twice.
    logits_mib: int = 256
    # Times the loss that balances the load of experts (Fedus et al. 2021, Switch Transformers, equation 4).
    router_loss: float = 0.0


@frozen
class PreferenceConfig(ObjectiveConfig):
    """Direct preference optimisation (Rafailov et al. 2023); `data.pairs` says that the data are pairs of answers."""

    kind: Literal["preference"] = "preference"
    beta: float = 0.1  # how strongly the policy is held at the reference
    label_smoothing: float = 0.0  # the chance that a label is wrong (conservative DPO), below 1/2
    length_normalised: bool = False  # the log-probabilities are divided by the answer's number of tokens
    # Times the chosen answer's loss a token, which is added (iterative RPO, Pang et al. 2024, equation 1).
    chosen_loss: float = 0.0
    # "frozen": the initial parameters, by frozen copies of what is trained; adapters are left out, so that LoRA's base is the
    # reference. "with_adapters": adapters are copied too, for a run that begins with trained ones. "none": reference-free.
    reference: Literal["frozen", "with_adapters", "none"] = "frozen"
    reference_dtype: Literal["float32", "bfloat16"] = "float32"  # how the copy is held
    logits_mib: int = 256  # as in NextTokenConfig


@frozen
class ContrastiveConfig(ObjectiveConfig):
    """Images and texts of a batch find each other, by the loss that the model names (`DualEncoderConfig.loss`).

    With `optimizer.accumulate` the loss stays one over the whole batch.
    """

    kind: Literal["contrastive"] = "contrastive"
    # How devices see each other's embeddings: all at once, or one device's after the other's, for very large batches.
    exchange: Literal["all_gather", "ring"] = "all_gather"
    max_scale: float | None = 100.0  # the learned scale of the logits is at most so much (CLIP); None: any (SigLIP)
    label_smoothing: float = 0.0  # of the softmax loss
    mask_duplicates: bool = False  # pairs of a batch with the same text are no negatives of each other
