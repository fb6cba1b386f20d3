"""Contrastive losses over all pairs of a batch that is cut over the devices of a mesh: CLIP's softmax (Radford et al. 2021,
figure 3) and SigLIP's sigmoid (Zhai et al. 2023, algorithm 1).

A device compares its own b rows with those of every device. Either it gathers them all at once (`all_gather`: logits
[b, B]), or they come by one device's rows at a time, each handing on to the next what it has (`ring`: logits [b, b], made again
in the backward pass). Both give the same sums.

    softmax   -log( exp z_ii / sum_j exp z_ij )      z_ij = scale x_i . y_j + bias
    sigmoid   -sum_j log sigmoid( +-z_ij )           + for i = j, - for others

Each is the mean of two directions, images among texts and texts among images; of the sigmoid's they are equal.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

Array = jax.Array

AXES = ("data", "fsdp")  # of the mesh, that the rows of a batch are cut over
NOTHING = -1e30  # a logit that does not count: finite, so that no gradient is NaN


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Pairs:
    """Some images and their texts."""

    images: Array  # [B, Z] float32 of length 1
    texts: Array  # [B, Z] float32 of length 1
    weights: Array  # [B] float32; a pair of weight 0 is not there, for others neither
    rows: Array  # [B] int32, which row of the whole batch each is
    groups: Array | None = None  # [B] int32: other pairs of one's own group are no negatives; None: all are


@dataclasses.dataclass(frozen=True, kw_only=True)
class ContrastiveLoss:
    """Which loss it is.

    Attributes:
      label_smoothing: of softmax: so much of the target is spread over all (Szegedy et al. 2016).
    """

    loss: Literal["softmax", "sigmoid"]
    exchange: Literal["all_gather", "ring"] = "all_gather"
    label_smoothing: float = 0.0

    def sums(self, pairs: Pairs, scale: Array, bias: Array) -> dict[str, Array]:
        """Sums over all pairs, on the mesh of the context (`jax.set_mesh`), if there is one.

        Args:
          scale, bias: [] float32.

        Returns:
          [] float32 each: "loss"; "weight"; "pairs", how many there are; "images_right" and "texts_right", how many of them are
          likest to their own among all.
        """
        mesh = jax.sharding.get_abstract_mesh()
        shards = 1 if mesh.empty else math.prod(mesh.shape[axis] for axis in AXES)
        if shards == 1:
            return self._local(pairs, scale, bias, shards=1)
        cut, whole = PartitionSpec(AXES), PartitionSpec()
        local = functools.partial(self._local, shards=shards)
        return jax.shard_map(local, in_specs=(cut, whole, whole), out_specs=whole)(pairs, scale, bias)

    def _local(self, own: Pairs, scale: Array, bias: Array, *, shards: int) -> dict[str, Array]:
        compare = functools.partial(self._compare, own, scale, bias)
        if self.exchange == "all_gather" and shards > 1:
            found = compare(jax.tree.map(lambda x: jax.lax.all_gather(x, AXES, tiled=True), own))
        else:
            found = compare(own)
        if self.exchange == "ring" and shards > 1:
            onward = [(device, (device + 1) % shards) for device in range(shards)]

            def step(carry: tuple[Pairs, Any], _: None) -> tuple[tuple[Pairs, Any], None]:
                others, found = carry
                others = jax.tree.map(lambda x: jax.lax.ppermute(x, AXES, onward), others)
                return (others, jax.tree.map(_joined, found, compare(others), is_leaf=_is_part)), None

            (_, found), _ = jax.lax.scan(jax.checkpoint(step, prevent_cse=False), (own, found), length=shards - 1)
        sums = self._sums(own, scale, bias, found)
        return sums if shards == 1 else jax.tree.map(lambda x: jax.lax.psum(x, AXES), sums)

    def _compare(self, own: Pairs, scale: Array, bias: Array, others: Pairs) -> list[Part]:
        """What each of our rows learns from some others: of images among texts, and of texts among images."""
        same = own.rows[:, None] == others.rows[None]
        counts = others.weights[None] > 0
        if own.groups is not None:
            counts = counts & (same | (own.groups[:, None] != others.groups[None]))
        parts = []
        for ours, theirs in ((own.images, others.texts), (own.texts, others.images)):
            logits = scale * (ours @ theirs.T) + bias
            counted = jnp.where(counts, logits, NOTHING)
            if self.loss == "softmax":
                value = jax.nn.logsumexp(counted, axis=1)
            else:
                value = -jnp.sum(jnp.where(counts, jax.nn.log_sigmoid(jnp.where(same, logits, -logits)), 0.0), axis=1)
            parts.append(
                Part(
                    softmax=self.loss == "softmax",
                    value=value,
                    total=jnp.sum(jnp.where(counts, logits, 0.0), axis=1),
                    count=jnp.sum(counts, axis=1, dtype=jnp.float32),
                    best=jnp.max(jnp.where(same, NOTHING, jax.lax.stop_gradient(counted)), axis=1),
                )
            )
        return parts

    def _sums(self, own: Pairs, scale: Array, bias: Array, found: list[Part]) -> dict[str, Array]:
        positive = scale * jnp.sum(own.images * own.texts, axis=1) + bias
        there = own.weights > 0
        losses, right = [], []
        for part in found:
            value = part.value
            if self.loss == "softmax":
                spread = self.label_smoothing
                value = value - (1 - spread) * positive
                if spread:
                    value = value - spread * part.total / jnp.maximum(part.count, 1)
            losses.append(jnp.sum(jnp.where(there, own.weights * value, 0.0)))
            right.append(jnp.sum(there & (positive > part.best), dtype=jnp.float32))
        return {
            "loss": (losses[0] + losses[1]) / 2,
            "weight": jnp.sum(own.weights),
            "pairs": jnp.sum(there, dtype=jnp.float32),
            "images_right": right[0],
            "texts_right": right[1],
        }


@functools.partial(jax.tree_util.register_dataclass, data_fields=["value", "total", "count", "best"], meta_fields=["softmax"])
@dataclasses.dataclass(frozen=True, kw_only=True)
class Part:
    """What rows learn from some others; parts from disjoint others are joined."""

    softmax: bool
    value: Array  # [B], softmax: the logarithm of the sum of exp z_ij; sigmoid: the loss
    total: Array  # [B], the sum of z_ij
    count: Array  # [B], how many count
    best: Array  # [B], the greatest z_ij of another pair


def _is_part(value: Any) -> bool:
    return isinstance(value, Part)


def _joined(one: Part, other: Part) -> Part:
    return Part(
        softmax=one.softmax,
        value=jnp.logaddexp(one.value, other.value) if one.softmax else one.value + other.value,
        total=one.total + other.total,
        count=one.count + other.count,
        best=jnp.maximum(one.best, other.best),
    )


def groups_of(tokens: Array) -> Array:
    """[B, T] int32 -> [B] int32, the same number for the same tokens: a polynomial hash of 32 bits."""
    powers = jnp.cumprod(jnp.full(tokens.shape[1], 0x01000193, jnp.uint32))
    mixed = (tokens.astype(jnp.uint32) + jnp.uint32(0x9E3779B9)) * powers[None]
    return jax.lax.bitcast_convert_type(jnp.sum(mixed ^ (mixed >> 15), axis=1, dtype=jnp.uint32), jnp.int32)
