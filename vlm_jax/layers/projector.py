"""The projector of LLaVA (Liu et al. 2023): features -> visual tokens as wide as the language model, one for each feature."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax

from vlm_jax.config import MlpProjectorConfig
from vlm_jax.config.register import MODULES
from vlm_jax.layers.linear import Linear, Norm
from vlm_jax.ops.activations import ACTIVATIONS
from vlm_jax.sharding import constrain

Array = jax.Array


@MODULES.add(MlpProjectorConfig)
class MlpProjector(nn.Module):
    """Features [B, M, I, P, D] -> visual tokens [B, M, I * P, O]. A frame that is not there gives tokens that nothing reads."""

    config: MlpProjectorConfig
    width: int
    dtype: Any

    @nn.compact
    def __call__(
        self, features: Array, frames: Array, *, mask: Array | None = None, return_attention: bool = False
    ) -> tuple[Array, None]:
        """
        Raises:
          ValueError: `return_attention`: a visual token is one feature, so there is nothing to tell.
        """
        if return_attention:
            raise ValueError("an MLP projector makes each visual token of one feature: it looks nowhere else")
        config = self.config
        x = features.reshape(*features.shape[:2], -1, self.width)
        if config.norm is not None:
            x = Norm(config.norm, self.width, self.dtype, name="norm")(x)
        for number in range(config.layers):
            x = ACTIVATIONS[config.activation](x) if number else x
            # The first map's output is split over `tensor`, the next one's input with it, as in a feed-forward.
            inputs = {"mlp": config.width} if number % 2 else {"embed": x.shape[-1]}
            outputs = {"mlp": config.width} if not number % 2 and number + 1 < config.layers else {"embed": config.width}
            x = Linear(inputs, outputs, config.bias, self.dtype, name=f"linear_{number}")(x)
        return constrain(x, "batch", None, "length", None), None
