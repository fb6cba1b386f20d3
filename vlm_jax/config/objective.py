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
