"""Model FLOPs of a step, counted in its jaxpr; and what the device could do.

`cost_analysis()` of a compiled program counts the body of a scan once and counts recomputation; a model's FLOPs are those of
the mathematics: every matrix product, times the length of the scans it stands in, without rematerialisation.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
from jax.extend import core

# Dense bfloat16 peaks of one device, in FLOP/s, from the vendors' data sheets; the key is found in `device_kind`.
PEAKS = {
    "H100": 989e12,
    "H200": 989e12,
    "A100": 312e12,
    "L4": 121e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
    "TPU7x": 2307e12,
}


def peak_flops(device: jax.Device) -> float | None:
    """bfloat16 FLOP/s of one device, None where it is not known (every CPU)."""
    return next((peak for name, peak in PEAKS.items() if name in device.device_kind), None)


def count_flops(fn: Callable[..., Any], *args: Any) -> int:
    """FLOPs of the matrix products of `fn(*args)`; `args` may be abstract.

    Raises:
      ValueError: a `while` loop, whose length is not in the program.
    """
    return _count(jax.make_jaxpr(fn)(*args).jaxpr)


def _count(jaxpr: core.Jaxpr) -> int:
    total = 0
    for eqn in jaxpr.eqns:
        name = eqn.primitive.name
        if name == "while":
            raise ValueError("the FLOPs of a while loop are not known before it runs")
        if name == "dot_general":
            (contracted, _), _ = eqn.params["dimension_numbers"]
            depth = math.prod(eqn.invars[0].aval.shape[axis] for axis in contracted)
            total += 2 * depth * math.prod(eqn.outvars[0].aval.shape)
            continue
        if name == "ragged_dot_general":
            total += _ragged(eqn)
            continue
        inner = [_count(sub) for sub in _inner(eqn)]
        if name == "scan":
            total += eqn.params["length"] * sum(inner)
        elif name == "shard_map":
            total += _parts(eqn) * sum(inner)
        else:
            total += max(inner, default=0) if name == "cond" else sum(inner)
    return total


def _ragged(eqn: Any) -> int:
    """A row of a ragged product meets the matrix of its own group alone."""
    numbers = eqn.params["ragged_dot_dimension_numbers"]
    (contracted, _), _ = numbers.dot_dimension_numbers
    rows, groups = eqn.invars[0].aval.shape, eqn.invars[2].aval.shape[-1]
    total = 2 * math.prod(rows[axis] for axis in contracted) * math.prod(eqn.outvars[0].aval.shape)
    # Contracted over the rows, it has a result for every group.
    return total // groups if set(numbers.lhs_ragged_dimensions) & set(contracted) else total


def _parts(eqn: Any) -> int:
    """Into how many parts a `shard_map` cuts the work: what it shares out, not what every device repeats."""
    entries = [entry for spec in (*eqn.params["in_specs"], *eqn.params["out_specs"]) for entry in spec if entry]
    names = {name for entry in entries for name in (entry if isinstance(entry, tuple) else (entry,))}
    return math.prod(eqn.params["mesh"].shape[name] for name in names)


def _inner(eqn: Any) -> list[core.Jaxpr]:
    found = []
    for value in eqn.params.values():
        for item in value if isinstance(value, tuple | list) else [value]:
            if isinstance(item, core.ClosedJaxpr):
                found.append(item.jaxpr)
            elif isinstance(item, core.Jaxpr):
                found.append(item)
    return found
