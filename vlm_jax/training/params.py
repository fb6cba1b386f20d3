"""Parameter shapes, shardings and freezing rules, known before any array is allocated."""

from __future__ import annotations

import dataclasses
import math
import re
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from vlm_jax.config import LoraConfig, ParamRule
from vlm_jax.layers.lora import PATH, dequantised
from vlm_jax.ops.quantised import quantise
from vlm_jax.paths import Params, by_path, nested
from vlm_jax.sharding import Named, Placement, boxed_params, place_tree, shardings_of, unboxed
from vlm_jax.training.adapters import adapter_boxes, check_rules, initial_adapters

DEFAULT = ParamRule(pattern="")
FIXED = ParamRule(pattern="", frozen=True)  # an adapter's scale, and those of an int8 kernel


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


def held_boxes(path: str, box: Any, rule: ParamRule) -> dict[str, Any]:
    """A parameter as it is held, by path: in float32, or frozen in the rule's type; with an int8 kernel its scales."""
    value = box.value if isinstance(box, Named) else box
    of = lambda value: box.replace(value=value) if isinstance(box, Named) else value
    dtype = rule.frozen_dtype if rule.frozen else "float32"
    if dtype != "int8":
        return {path: of(jax.ShapeDtypeStruct(value.shape, dtype))}
    if not getattr(box, "inputs", 0):
        return {path: of(jax.ShapeDtypeStruct(value.shape, jnp.bfloat16))}
    contracted = _contracted(box)
    once = lambda sizes, one: tuple(one if axis in contracted else size for axis, size in enumerate(sizes))
    scale = Named(jax.ShapeDtypeStruct(once(value.shape, 1), jnp.float32), once(box.names, None))
    return {path: of(jax.ShapeDtypeStruct(value.shape, jnp.int8)), f"{path}_scale": scale}


def _contracted(box: Named) -> tuple[int, ...]:
    """The axes of a kernel that a product contracts."""
    lead = int(box.names[0] == "layers")
    return tuple(range(lead, lead + box.inputs))


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

    boxed: Any  # shapes, the types they are held in, and the names of their axes
    placements: dict[str, Placement]
    rules: dict[str, ParamRule]
    mesh: Mesh
    adapters: tuple[LoraConfig, ...]

    @classmethod
    def of(cls, model: nn.Module, rules: tuple[ParamRule, ...], mesh: Mesh, adapters: tuple[LoraConfig, ...] = ()) -> Blueprint:
        """
        Raises:
          ValueError: a rule or an adapter that matches no parameter, or an adapter that is frozen.
        """
        boxes = by_path(boxed_params(model))
        boxes |= adapter_boxes(boxes, adapters)
        resolved = resolve(list(boxes), rules)
        resolved |= {path: FIXED for path in boxes if (found := PATH.fullmatch(path)) and found["leaf"] == "scale"}
        check_rules(resolved)
        held: dict[str, Any] = {}
        for path, box in boxes.items():
            held |= held_boxes(path, box, resolved[path])
        boxed = nested(held)
        return cls(boxed, by_path(place_tree(boxed, mesh)), {path: resolved.get(path, FIXED) for path in held}, mesh, adapters)

    @property
    def shardings(self) -> Params:
        return shardings_of(nested(self.placements), self.mesh)

    @property
    def abstract(self) -> Params:
        """Shapes, the types they are held in, and shardings."""

        def of(path: str, leaf: Any) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(self.mesh, self.placements[path].spec))

        return nested({path: of(path, leaf) for path, leaf in by_path(unboxed(self.boxed)).items()})

    @property
    def counts(self) -> tuple[int, int]:
        """All parameters, and those that are trained; of `rows_from` the rows that are. Scales of int8 kernels are none."""
        total = trained = 0
        for path, leaf in by_path(unboxed(self.boxed)).items():
            if path.endswith("/kernel_scale"):
                continue
            rule, size = self.rules[path], math.prod(leaf.shape)
            total += size
            trained += 0 if rule.frozen else size - rule.rows_from * (size // leaf.shape[0] if rule.rows_from else 0)
        return total, trained

    @property
    def without_held(self) -> Params:
        """Shapes of the model's own parameters: no adapters, no scales of int8 kernels."""
        flat = by_path(unboxed(self.boxed))
        return nested({p: leaf for p, leaf in flat.items() if not PATH.fullmatch(p) and not p.endswith("/kernel_scale")})

    def hold(self, params: Params, key: jax.Array) -> Params:
        """Parameters in the types they are held in, with the adapters that they lack; those of an int8 run may be given too.

        An adapter's scale is what `adapters` say, whatever it was.

        Args:
          key: of the adapters' initial numbers.
        """
        flat, boxes = by_path(dequantised(params)), by_path(self.boxed)
        begins = lambda path: path not in flat or path.endswith("/scale")
        missing = {path: box for path, box in boxes.items() if PATH.fullmatch(path) and begins(path)}
        flat |= by_path(initial_adapters(missing, self.adapters, key))
        held: dict[str, Any] = {}
        for path, leaf in flat.items():
            dtype = unboxed(boxes[path]).dtype
            if dtype == jnp.int8:
                held[path], held[f"{path}_scale"] = quantise(leaf, _contracted(boxes[path]))
            else:
                held[path] = leaf.astype(dtype)
        return nested(held)
