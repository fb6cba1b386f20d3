"""Preference: direct preference optimisation (Rafailov et al. 2023) against a frozen reference.

The reference is made of two trees, the run's parameters and the frozen copies that its state keeps (`TrainState.reference`):
the parameters without their adapters, with the copies in the place of what is trained. So with LoRA the base is the reference
and nothing is copied; where everything is trained everything is; LoRA beside a trained projector copies the projector alone.

A pair's two answers are two segments of a row that see the same picture, which is encoded once. The prompt, and where visual
tokens stand in the sequence those too, are repeated in each, unless `data.share_prefix` lets them share what they begin with.
Where the vision encoder is frozen the reference reads the features that were computed for the policy.
"""

from __future__ import annotations

import dataclasses
import logging
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from vlm_jax.batch import Batch
from vlm_jax.config import PreferenceConfig
from vlm_jax.layers.lora import PATH, without_adapters
from vlm_jax.ops.preference import dpo_loss, pair_log_probs
from vlm_jax.paths import Params, by_path, nested
from vlm_jax.training.objective import OBJECTIVES, Objective, Sums
from vlm_jax.training.objectives.next_token import learned_scores

Array = jax.Array
log = logging.getLogger(__name__)

Answers = tuple[Array, Array, Array, Array]  # of `pair_log_probs`
MEANS = ("margin", "chosen_reward", "rejected_reward", "chosen_log_prob", "rejected_log_prob")


def adapters_of(path: str) -> bool:
    """Whether a parameter belongs to an adapter."""
    return PATH.fullmatch(path) is not None


@OBJECTIVES.add(PreferenceConfig)
class Preference(Objective):
    """Means over pairs: `loss`; `reward_accuracy`, how often the chosen answer has the higher reward; `margin` of the rewards.

    A reward is beta times the log-ratio of the policy and the reference.
    """

    checkpoint_metric, examples_metric = "reward_accuracy", "pairs"
    reads_pairs = True

    def __init__(self, config: PreferenceConfig) -> None:
        if not 0.0 <= config.label_smoothing < 0.5:
            raise ValueError(f"config.objective.label_smoothing={config.label_smoothing}: expected at least 0 and below 0.5")
        self.config = config

    def reference_of(self, trained: Params) -> Params:
        """The frozen copies that the state keeps, of a run's trained parameters as they are at its beginning."""
        if self.config.reference == "none":
            return {}
        kept = self.config.reference == "with_adapters"
        copies = {path: leaf for path, leaf in by_path(trained).items() if kept or not adapters_of(path)}
        return nested({path: jnp.array(leaf, self.config.reference_dtype, copy=True) for path, leaf in copies.items()})

    def describe_reference(self, trained: Params) -> str:
        """For the log of a run's start."""
        if self.config.reference == "none":
            return "no reference: the rewards are the policy's own log-probabilities"
        paths = list(by_path(trained))
        adapters = sum(map(adapters_of, paths))
        if not adapters or self.config.reference == "with_adapters":
            return f"the reference is a frozen copy of the {len(paths)} trained arrays"
        rest = len(paths) - adapters
        return "the reference is the base model without its adapters" + (
            f", with frozen copies of {rest} other trained arrays" if rest else ": nothing is copied"
        )

    def check_start(self, trained: Params) -> None:
        """Warns of trained adapters that already do something at the beginning: the reference leaves them out."""
        if self.config.reference != "frozen":
            return
        begun = [path for path, leaf in by_path(trained).items() if adapters_of(path) and path.endswith("/b") and jnp.any(leaf)]
        if begun:
            log.warning(
                "the run begins with adapters that are trained already (%s and %d more), and the reference is the base model "
                "without them: set config.objective.reference=with_adapters to compare with the parameters it begins with",
                begun[0],
                len(begun) - 1,
            )

    def reference_params(self, params: Params, reference: Params) -> Params:
        """The parameters of the reference, from those of the run and the copies of its state."""
        base = params if self.config.reference == "with_adapters" else without_adapters(params)
        return nested(by_path(base) | by_path(reference))

    def weight(self, batch: Batch) -> Array:
        return jnp.maximum(jnp.sum(_pair_weights(batch)), 1.0)

    def sums(
        self, model: nn.Module, params: Params, batch: Batch, *, recompute: bool = True, reference: Params | None = None
    ) -> Sums:
        """
        Args:
          reference: of the state, as `reference_of` gave it.
        """
        frozen = self.reference_params(params, reference or {}) if self.config.reference != "none" else None
        if frozen is not None and _same_features(params, frozen) and batch.images is not None and batch.sizes is None:
            batch = _with_features(model, params, batch)
        policy = self.answers(model, params, batch, recompute=recompute)
        if frozen is None:
            return self.sums_of(policy, None, batch)
        return self.sums_of(policy, jax.lax.stop_gradient(self.answers(model, frozen, batch, recompute=recompute)), batch)

    def answers(self, model: nn.Module, params: Params, batch: Batch, *, recompute: bool = True) -> Answers:
        """The log-probabilities of all answers under some parameters, policy or reference."""
        nll, *_ = learned_scores(model, params, batch, logits_mib=self.config.logits_mib if recompute else None)
        return pair_log_probs(nll, batch.weights > 0, batch.preference, pairs=_most_pairs(batch))

    def sums_of(self, policy: Answers, base: Answers | None, batch: Batch) -> Sums:
        """Sums over the pairs of a batch.

        Args:
          base: of the reference; None: reference-free.
        """
        config, weights = self.config, _pair_weights(batch)
        chosen, rejected, *tokens = policy
        chosen_tokens, rejected_tokens = (jnp.maximum(count, 1.0) for count in tokens)

        def reward(policy: Array, base: Array | float, count: Array) -> Array:
            ratio = policy - base
            return config.beta * (ratio / count if config.length_normalised else ratio)

        chosen_base, rejected_base = (0.0, 0.0) if base is None else base[:2]
        rewards = reward(chosen, chosen_base, chosen_tokens), reward(rejected, rejected_base, rejected_tokens)
        loss = dpo_loss(*rewards, label_smoothing=config.label_smoothing)
        if config.chosen_loss:
            loss = loss - config.chosen_loss * chosen / chosen_tokens
        margin = rewards[0] - rewards[1]
        each = dict(zip(MEANS, (margin, *rewards, chosen, rejected), strict=True))
        each |= {"loss": loss, "reward_accuracy": (margin > 0).astype(jnp.float32), "pairs": jnp.ones_like(loss)}
        return {name: jnp.sum(jnp.where(weights > 0, value * weights, 0.0)) for name, value in each.items()}

    def means(self, sums: dict[str, Any]) -> dict[str, Any]:
        pairs = jnp.maximum(sums["pairs"], 1.0)
        names = ("loss", "reward_accuracy", *MEANS)
        return {name: sums[name] / pairs for name in names} | {"pairs": sums["pairs"]}

    def training_line(self, metrics: dict[str, float]) -> str:
        return f"loss {metrics['loss']:.4f}  reward accuracy {metrics['reward_accuracy']:.1%}  margin {metrics['margin']:.3f}"

    def evaluation_line(self, metrics: dict[str, float]) -> str:
        return (
            f"reward accuracy {metrics['reward_accuracy']:.2%} on {metrics['pairs']:,.0f} held-out pairs, "
            f"margin {metrics['margin']:.3f}, loss {metrics['loss']:.4f}"
        )


def _most_pairs(batch: Batch) -> int:
    return batch.tokens.shape[1] // 2 + 1  # a half has one token at least


def _pair_weights(batch: Batch) -> Array:
    """[B, pairs] float32, the weight of each pair: that of its chosen answer's tokens; 0: there is no such pair."""
    place = jnp.where(batch.preference > 0, batch.preference - 1, _most_pairs(batch))
    most = jax.vmap(lambda x, at: jax.ops.segment_max(x, at, _most_pairs(batch) + 1)[:-1])(batch.weights, place)
    return jnp.maximum(most, 0.0)  # of an empty segment the maximum is -inf


def _same_features(params: Params, frozen: Params) -> bool:
    """Whether policy and reference have the same vision encoder, one that is not trained."""
    ours, theirs = (by_path(tree.get("vision", {})) for tree in (params, frozen))
    return bool(ours) and ours.keys() == theirs.keys() and all(leaf is theirs[path] for path, leaf in ours.items())


def _with_features(model: nn.Module, params: Params, batch: Batch) -> Batch:
    """The features of the pictures in their place: policy and reference then read what was computed once."""
    images = batch.images
    features = model.apply({"params": params}, images.reshape(-1, *images.shape[3:]), method="features")
    features = features.reshape(*images.shape[:3], *features.shape[1:]).astype(jnp.float32)
    return dataclasses.replace(batch, images=None, features=jax.lax.stop_gradient(features))
