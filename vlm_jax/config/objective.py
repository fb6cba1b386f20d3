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
