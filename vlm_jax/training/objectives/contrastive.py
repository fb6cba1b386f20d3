"""Images and texts of a batch find each other: CLIP's loss (Radford et al. 2021) and SigLIP's (Zhai et al. 2023).

With `optimizer.accumulate` k the towers run on k micro-batches and the loss is one over the whole batch (GradCache, Gao et al.
2021): of each micro-batch only its embeddings are kept, and the backward pass runs it again to hand their gradients on to the
parameters. That is what differentiating a rematerialised scan does, so there is no second copy of the chain rule here.

Pairs of a batch that have the same text are taken for negatives of each other, as CLIP's and SigLIP's authors do;
`mask_duplicates` leaves them out.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from vlm_jax.batch import Batch, micro_batches
from vlm_jax.config import ContrastiveConfig
from vlm_jax.ops.contrastive import ContrastiveLoss, Pairs, groups_of
from vlm_jax.training.objective import OBJECTIVES, Objective, Sums

Array = jax.Array


@OBJECTIVES.add(ContrastiveConfig)
class Contrastive(Objective):
    """`loss` a pair; `accuracy`, how many images and texts are likest to their own among all of a batch."""

    checkpoint_metric, examples_metric = "accuracy", "pairs"
    whole_batch = True

    def __init__(self, config: ContrastiveConfig) -> None:
        self.config = config

    def weight(self, batch: Batch) -> Array:
        return jnp.maximum(jnp.sum(_row_weights(batch)), 1.0)

    def sums(self, model: nn.Module, params: Any, batch: Batch, *, recompute: bool = True, micro: int = 1) -> Sums:
        embed = lambda part: model.apply({"params": params}, part, method="embed_pairs")
        if micro > 1 and recompute:
            embeddings = jax.lax.map(jax.checkpoint(embed, prevent_cse=False), micro_batches(batch, micro))
            images, texts = (x.swapaxes(0, 1).reshape(-1, x.shape[-1]) for x in embeddings)
        else:
            images, texts = embed(batch)
        scale, bias = model.apply({"params": params}, method="logit_scalars")
        pairs = Pairs(
            images=images,
            texts=texts,
            weights=_row_weights(batch),
            rows=jnp.arange(images.shape[0], dtype=jnp.int32),
            groups=groups_of(batch.tokens) if self.config.mask_duplicates else None,
        )
        config = self.config
        loss = ContrastiveLoss(loss=model.config.loss, exchange=config.exchange, label_smoothing=config.label_smoothing)
        sums = loss.sums(pairs, scale, bias)
        return sums | {"scale": scale * sums["weight"]}

    def bound(self, trained: Any) -> Any:
        """The parameters after an update with the scale within its bound, as CLIP clips it (section 2.5)."""
        if self.config.max_scale is None or "logit_scale" not in trained:
            return trained
        return trained | {"logit_scale": jnp.minimum(trained["logit_scale"], float(np.log(self.config.max_scale)))}

    def means(self, sums: dict[str, Any]) -> dict[str, Any]:
        weight, pairs = (jnp.maximum(sums[name], 1.0) for name in ("weight", "pairs"))
        return {
            "loss": sums["loss"] / weight,
            "accuracy": (sums["images_right"] + sums["texts_right"]) / (2 * pairs),
            "image_accuracy": sums["images_right"] / pairs,
            "text_accuracy": sums["texts_right"] / pairs,
            "scale": sums["scale"] / weight,
            "pairs": sums["pairs"],
        }

    def training_line(self, metrics: dict[str, float]) -> str:
        return f"loss {metrics['loss']:.4f}  accuracy {metrics['accuracy']:.1%}  scale {metrics['scale']:.1f}"

    def evaluation_line(self, metrics: dict[str, float]) -> str:
        return (
            f"accuracy within a batch {metrics['image_accuracy']:.2%} of images, {metrics['text_accuracy']:.2%} of texts, on "
            f"{metrics['pairs']:,.0f} held-out pairs, loss {metrics['loss']:.4f}"
        )


def _row_weights(batch: Batch) -> Array:
    """[B] float32: the weight of a row's text; 0 of a row that is empty."""
    return jnp.max(batch.weights, axis=1)
