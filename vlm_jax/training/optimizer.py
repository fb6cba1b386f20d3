"""AdamW with warm-up, clipping, and a rate and a decay for each parameter path."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax

from vlm_jax.config import OptimizerConfig, ParamRule
from vlm_jax.paths import Params, by_path, nested
from vlm_jax.training.params import trained_rows


def schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Linear warm-up from 0, then what `OptimizerConfig.schedule` says until `steps` updates.

    Raises:
      ValueError: a decay that is longer than what follows the warm-up, or "wsd" without one.
    """
    rest, last = max(steps - config.warmup_steps, 1), config.final_lr * config.lr
    if not (0 < config.decay_steps <= rest if config.schedule == "wsd" else config.decay_steps == 0):
        raise ValueError(
            f"config.optimizer.decay_steps={config.decay_steps} of schedule={config.schedule!r}: expected 1 to {rest} of wsd, "
            "and 0 of any other"
        )
    decay = optax.linear_schedule(config.lr, last, max(config.decay_steps, 1))
    after = {
        "cosine": optax.cosine_decay_schedule(config.lr, rest, alpha=config.final_lr),
        "constant": optax.constant_schedule(config.lr),
        "linear": optax.linear_schedule(config.lr, last, rest),
        "wsd": optax.join_schedules([optax.constant_schedule(config.lr), decay], [rest - config.decay_steps]),
    }[config.schedule]
    warmup = optax.linear_schedule(0.0, config.lr, config.warmup_steps)
    # Shifted by one, so that the first update already moves.
    return optax.join_schedules([lambda step: warmup(step + 1), after], [config.warmup_steps])


def make_optimizer(config: OptimizerConfig, rules: dict[str, ParamRule], steps: int) -> optax.GradientTransformation:
    """AdamW (Loshchilov & Hutter 2019) over the trained parameters.

    The decay is decoupled and scaled by the rate, as in optax and PyTorch.
    """

    def clip(updates: Params, params: Params) -> Params:
        # One factor times each gradient, which XLA fuses into what follows; `optax.clip_by_global_norm` divides each and
        # multiplies it, which is stored in between.
        factor = config.clip_norm / jnp.maximum(optax.global_norm(updates), config.clip_norm)
        return jax.tree.map(lambda update: update * factor, updates)

    def decay(updates: Params, params: Params) -> Params:
        flat = by_path(params)
        add = lambda path, update: update + config.weight_decay * rules[path].decay * flat[path]
        return nested({path: add(path, update) for path, update in by_path(updates).items()})

    def rates(updates: Params, params: Params) -> Params:
        scaled = {path: rules[path].lr * update for path, update in by_path(updates).items()}
        return trained_rows(nested(scaled), rules)

    return optax.chain(
        optax.stateless(lambda updates, params: trained_rows(updates, rules)),  # before the norm is taken
        optax.stateless(clip),
        optax.scale_by_adam(config.b1, config.b2, config.eps),
        optax.stateless(decay),
        optax.stateless(rates),
        optax.scale_by_learning_rate(schedule(config, steps)),
    )
