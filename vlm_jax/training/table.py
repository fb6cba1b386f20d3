"""The table printed at the start of a run: part, parameters, trained or frozen, type, rate, sharding, bytes per device."""

from __future__ import annotations

import math
from collections import defaultdict
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from vlm_jax.config import ParamRule
from vlm_jax.layers.lora import PATH
from vlm_jax.paths import by_path
from vlm_jax.training.step import Trainer


def _sharding(spec: Any, mesh: Any) -> tuple[str, int]:
    axes = [axis for entry in spec if entry for axis in (entry if isinstance(entry, tuple) else (entry,))]
    return "*".join(sorted(axes)) or "replicated", math.prod(mesh.shape[axis] for axis in axes)


def _status(rule: ParamRule) -> str:
    if rule.frozen:
        return "frozen"
    return f"rows {rule.rows_from}.. trained" if rule.rows_from else "trained"


def _bytes(count: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    raise AssertionError


def start_table(trainer: Trainer) -> tuple[Table, list[str]]:
    """The table, and a line for each kind of parameter that could not be sharded as the rules specify."""
    config, mesh = trainer.config.optimizer, trainer.mesh
    state = trainer.abstract_state
    leaves = by_path(state.params)
    rows: dict[Any, dict[str, Any]] = defaultdict(lambda: {"count": 0, "bytes": 0.0, "sharding": defaultdict(int)})
    reasons: dict[str, int] = defaultdict(int)
    for path, leaf in leaves.items():
        rule, placement = trainer.rules[path], trainer.blueprint.placements[path]
        sharding, shards = _sharding(placement.spec, mesh)
        rate = 0.0 if rule.frozen else rule.lr * config.lr
        decay = 0.0 if rule.frozen else rule.decay * config.weight_decay
        part, scales, size = path.split("/")[0], path.endswith("/kernel_scale"), math.prod(leaf.shape)
        if found := PATH.fullmatch(path):
            part = f"{part} lora/{found['name']}"
        row = rows[(part, _status(rule), "int8" if scales else str(leaf.dtype), rate, decay)]
        row["count"] += 0 if scales else size  # an int8 kernel's scales are no parameters of the model, but bytes
        # Parameters, and for trained ones the gradient and Adam's two moments.
        row["bytes"] += size * np.dtype(leaf.dtype).itemsize * (1 if rule.frozen else 4) / shards
        row["sharding"][sharding] += 0 if scales else size
        for reason in placement.replicated:
            reasons[f"{path.split('/')[0]}: {reason}"] += 1
    for path, leaf in by_path(state.reference).items():
        sharding, shards = _sharding(trainer.blueprint.placements[path].spec, mesh)
        row = rows[("reference", "frozen copy", str(leaf.dtype), 0.0, 0.0)]
        row["count"] += leaf.size
        row["bytes"] += leaf.size * np.dtype(leaf.dtype).itemsize / shards
        row["sharding"][sharding] += leaf.size
    table = Table(
        title=f"mesh {dict(mesh.shape)} of {mesh.size} {mesh.devices.flat[0].device_kind} devices", title_justify="left"
    )
    for name in ("part", "parameters", "", "type", "peak rate", "decay", "sharding", "bytes a device"):
        table.add_column(name, justify="right" if name in ("parameters", "peak rate", "decay", "bytes a device") else "left")
    for (part, fate, dtype, rate, decay), row in sorted(rows.items(), key=lambda item: item[0][:2]):
        ranked = sorted(row["sharding"].items(), key=lambda item: -item[1])
        shares = ", ".join(f"{name} {size / row['count']:.0%}" if len(ranked) > 1 else name for name, size in ranked)
        table.add_row(part, f"{row['count']:,}", fate, dtype, f"{rate:.2g}", f"{decay:.2g}", shares, _bytes(row["bytes"]))
    table.add_section()
    total = sum(row["count"] for row in rows.values())
    table.add_row("all", f"{total:,}", "", "", "", "", "", _bytes(sum(row["bytes"] for row in rows.values())))
    notes = [f"replicated, {reason} ({count} arrays)" for reason, count in sorted(reasons.items())]
    if described := trainer.objective.describe_reference(state.trained):
        notes.append(described)
    return table, notes


def print_table(trainer: Trainer) -> None:
    table, notes = start_table(trainer)
    console = Console(width=None if Console().is_terminal else 140)
    console.print(table)
    for note in notes:
        console.print(note, markup=False)
