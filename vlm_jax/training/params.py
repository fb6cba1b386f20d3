"""Parameter shapes, shardings and freezing rules, known before any array is allocated."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from vlm_jax.config import ParamRule
from vlm_jax.paths import Params, by_path, nested
from vlm_jax.sharding import Placement, boxed_params, place_tree, shardings_of, unboxed

DEFAULT = ParamRule(pattern="")


def resolve(paths: list[str], rules: tuple[ParamRule, ...]) -> dict[str, ParamRule]:
    """The rule of each path: the first whose pattern is found in it, or the default (trained, full rate, full decay).

    Raises:
      ValueError: a pattern that matches no path, which is most often a misspelling.
    """
    idle = [rule.pattern for rule in rules if not any(re.search(rule.pattern, path) for path in paths)]
    if idle:
        raise ValueError(
            f"config.optimizer.rules: no parameter path matches {idle}; the paths begin with "
            f"{sorted({'/'.join(path.split('/')[:2]) for path in paths})}"
        )
    return {path: next((rule for rule in rules if re.search(rule.pattern, path)), DEFAULT) for path in paths}


def split(params: Params, rules: dict[str, ParamRule]) -> tuple[Params, Params]:
    """(trained, frozen), each a nested dict without the other's leaves."""
    flat = by_path(params)
    trained = {path: leaf for path, leaf in flat.items() if not rules[path].frozen}
    frozen = {path: leaf for path, leaf in flat.items() if rules[path].frozen}
    return nested(trained), nested(frozen)


def merge(trained: Params, frozen: Params) -> Params:
    """The inverse of `split`."""
    return nested(by_path(trained) | by_path(frozen))


def stored(path: str, leaf: Any, rules: dict[str, ParamRule]) -> Any:
    """A parameter in the type it is held in: float32, or a frozen one's `frozen_dtype`."""
    return leaf.astype(stored_dtype(rules[path]))


def stored_dtype(rule: ParamRule) -> Any:
    return jnp.dtype(rule.frozen_dtype if rule.frozen else "float32")


def trained_rows(params: Params, rules: dict[str, ParamRule]) -> Params:
    """Zeroes what `rows_from` leaves out: the rows before it of a gradient or an update."""

    def cut(path: str, leaf: jax.Array) -> jax.Array:
        start = rules[path].rows_from
        if not start:
            return leaf
        keep = jnp.arange(leaf.shape[0]) >= start
        return jnp.where(keep.reshape(-1, *(1,) * (leaf.ndim - 1)), leaf, 0)

    return nested({path: cut(path, leaf) for path, leaf in by_path(params).items()})


@dataclasses.dataclass(frozen=True)
class Blueprint:
    """Parameters before any array is allocated; works with abstract devices (ahead-of-time compilation)."""

    boxed: Any  # shapes with the names of their axes, as `model.init` gives them
    placements: dict[str, Placement]
    rules: dict[str, ParamRule]
    mesh: Mesh

    @classmethod
    def of(cls, model: nn.Module, rules: tuple[ParamRule, ...], mesh: Mesh) -> Blueprint:
        """
        Raises:
          ValueError: a rule that matches no parameter.
        """
        boxed = boxed_params(model)
        placements = by_path(place_tree(boxed, mesh))
        return cls(boxed, placements, resolve(list(placements), rules), mesh)

    @property
    def shardings(self) -> Params:
        return shardings_of(nested(self.placements), self.mesh)

    @property
    def abstract(self) -> Params:
        """Shapes, the types they are held in, and shardings."""

        def of(path: str, leaf: Any) -> jax.ShapeDtypeStruct:
            sharding = NamedSharding(self.mesh, self.placements[path].spec)
            return jax.ShapeDtypeStruct(leaf.shape, stored_dtype(self.rules[path]), sharding=sharding)

        return nested({path: of(path, leaf) for path, leaf in by_path(unboxed(self.boxed)).items()})
