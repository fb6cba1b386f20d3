"""Direct preference optimisation (Rafailov et al. 2023): a chosen and a rejected answer to the same prompt, as arrays of pairs.

Arrays are [pairs] float32; where pairs stand in the rows of a batch, [B, pairs].
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

Array = jax.Array


def pair_log_probs(nll: Array, learned: Array, preference: Array, *, pairs: int) -> tuple[Array, Array, Array, Array]:
    """The log-probabilities of both answers of every pair, from those of their tokens.

    Args:
      nll: [B, T] float32, the negative log-likelihood of each target.
      learned: [B, T] bool, whether it is one of an answer's tokens.
      preference: [B, T] int32, as in `Batch`: +p in the chosen half of the row's pair p, -p in the rejected one, 0 elsewhere.
      pairs: how many a row may have.

    Returns:
      [B, pairs] float32 sums over the chosen and over the rejected answers' tokens, and their numbers of tokens; 0 of a pair
      that is not there.
    """

    def of_half(sign: int) -> tuple[Array, Array]:
        here = learned & (sign * preference > 0)
        # Pair 1 goes to place 0; what belongs to no pair goes to a place that is cut off.
        place = jnp.where(here, jnp.abs(preference) - 1, pairs)
        count = jax.vmap(lambda x, at: jax.ops.segment_sum(x, at, pairs + 1)[:pairs])
        return count(jnp.where(here, -nll, 0.0), place), count(here.astype(jnp.float32), place)

    chosen, chosen_tokens = of_half(1)
    rejected, rejected_tokens = of_half(-1)
    return chosen, rejected, chosen_tokens, rejected_tokens


def dpo_loss(chosen_reward: Array, rejected_reward: Array, *, label_smoothing: float = 0.0) -> Array:
    """-log sigmoid of the reward margin (Rafailov et al. 2023, equation 7).

    Args:
      chosen_reward, rejected_reward: beta times the log-ratio of policy and reference.
      label_smoothing: the chance that a label is wrong (conservative DPO, Mitchell 2023): the loss is the mean over both.
    """
    margin = chosen_reward - rejected_reward
    return -(1.0 - label_smoothing) * jax.nn.log_sigmoid(margin) - label_smoothing * jax.nn.log_sigmoid(-margin)
