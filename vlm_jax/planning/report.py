"""What a compiled program means on a device: does it fit, what bounds it, how long it may take; as a dict and as a table."""

from __future__ import annotations

import dataclasses
from typing import Any

from rich.console import Console
from rich.table import Table

from vlm_jax.config import RunConfig
from vlm_jax.planning.hardware import Target
from vlm_jax.planning.hlo import Program, estimated_cycles
from vlm_jax.planning.programs import Planned
from vlm_jax.progress import human_rate

GIB = 2**30


def figures(planned: Planned, target: Target) -> dict[str, Any]:
    """All figures of a program, of one device where they do not say otherwise. Times are in seconds.

    "compute", "memory" and "links" are lower bounds: the mathematics at the peak of bfloat16, what instructions read and write
    at the memory's bandwidth, what is sent at that of all links. "compiler" is what the compiler expects of its instructions.
    """
    program, chip, devices = Program(planned.compiled.as_text()), target.chip, planned.mesh.size
    sent = program.collectives(planned.mesh)
    found: dict[str, Any] = {
        "program": planned.name,
        "mesh": dict(planned.mesh.shape),
        "devices": devices,
        "parameters": planned.parameters,
        "trained_parameters": planned.trained,
        "bytes": dict(planned.arguments) | {"temporary": planned.temporary, "all": planned.bytes},
        "model_flops": planned.model_flops,
        "tokens": planned.tokens,
        "memory_bytes": program.memory_bytes(),
        "collectives": [dataclasses.asdict(one) for one in sent],
        "unknown_loops": program.unknown_loops,
        "compile_seconds": planned.seconds,
    }
    if chip is None:
        return found
    over_network = [one for one in sent if target.slices > 1 and "data" in one.axes.split("*")]
    slow = sum(one.bytes for one in over_network)
    times = {
        "compute": planned.model_flops / devices / chip.flops,
        "memory": found["memory_bytes"] / chip.bandwidth,
        "links": (sum(one.bytes for one in sent) - slow) / chip.link + slow / chip.network,
    }
    cycles = estimated_cycles(program)
    if cycles is not None and chip.clock:
        times["compiler"] = cycles / chip.clock
    seconds = times.get("compiler") or max(times.values())
    return found | {
        "device": chip.name,
        "capacity": chip.memory,
        "fits": planned.bytes <= chip.memory,
        "seconds": times,
        "step_seconds": seconds,
        "mfu": times["compute"] / seconds,
        "tokens_per_second": planned.tokens / seconds,
    }


def device_hours(found: dict[str, Any], tokens: float) -> float:
    """Of all devices together, for so many tokens."""
    return tokens / found["tokens_per_second"] * found["devices"] / 3600


def advice(found: dict[str, Any], config: RunConfig) -> list[str]:
    """What to change, of a program that does not fit."""
    if found.get("fits", True):
        return []
    held, over = found["bytes"], found["bytes"]["all"] - found["capacity"]
    lines = [f"{over / GIB:.1f} GiB a device more than there are"]
    if found["program"] == "update":
        if config.remat != "full":
            saved = f"{held['temporary'] / GIB:.1f} GiB"
            lines.append(f"--config.remat=full (now {config.remat}): activations are computed again, of {saved}")
        elif held["temporary"] > over:
            lines.append(
                f"--config.optimizer.accumulate={2 * config.optimizer.accumulate}, or fewer --config.data.rows: temporary "
                f"memory is {held['temporary'] / GIB:.1f} GiB"
            )
        frozen = held.get("frozen parameters", 0)
        if frozen > 0.2 * held["all"]:
            lines.append(f"frozen_dtype='int8' in the rules of frozen parameters ({frozen / GIB:.1f} GiB)")
    if config.mesh.fsdp != -1 and found["mesh"]["data"] > 1:
        lines.append("--config.mesh.fsdp=-1 --config.mesh.data=1: every parameter is split over all devices")
    elif found["mesh"]["tensor"] == 1:
        lines.append("--config.mesh.tensor=8: layers are split too")
    lines.append("or more devices")
    return lines


def print_plan(
    found: dict[str, Any], config: RunConfig, *, tokens: float | None = None, console: Console | None = None
) -> None:
    """
    Args:
      tokens: to read in training; device-hours are told for them.
    """
    console = console or Console(width=None if Console().is_terminal else 120)
    mesh = ", ".join(f"{name}={size}" for name, size in found["mesh"].items())
    device = found.get("device", "CPU")
    table = Table(title=f"{found['program']} on {found['devices']} x {device}, {mesh}", title_justify="left")
    table.add_column("")
    table.add_column("a device", justify="right")
    capacity = found.get("capacity")
    for name, size in found["bytes"].items():
        share = f"  {size / capacity:.0%}" if capacity else ""
        table.add_row(f"memory: {name}", f"{size / GIB:.2f} GiB{share}", end_section=name == "all")
    table.add_row("parameters, all devices", f"{found['parameters']:,}")
    if found["trained_parameters"]:
        table.add_row("  trained", f"{found['trained_parameters']:,}")
    table.add_row("model FLOPs", human_rate(found["model_flops"] / found["devices"], "FLOP"))
    table.add_row("read and written", human_rate(found["memory_bytes"], "B"), end_section=True)
    for one in found["collectives"]:
        table.add_row(f"{one['kind']} over {one['axes'] or 'itself'}, {one['count']} times", human_rate(one["bytes"], "B"))
    table.add_section()
    for name, seconds in found.get("seconds", {}).items():
        table.add_row(f"time: {name}", f"{1000 * seconds:,.1f} ms")
    if "mfu" in found:
        table.add_row("predicted time", f"{1000 * found['step_seconds']:,.1f} ms")
        table.add_row("predicted MFU", f"{found['mfu']:.1%}")
        table.add_row("tokens a second, all devices", human_rate(found["tokens_per_second"], ""))
    if tokens and "mfu" in found:
        table.add_row(f"device-hours for {human_rate(tokens, 'tokens')}", f"{device_hours(found, tokens):,.0f}")
    console.print(table)
    if found["unknown_loops"]:
        console.print(f"{found['unknown_loops']} loops do not say how often they run: they count once", markup=False)
    if "fits" in found:
        console.print("fits" if found["fits"] else "does not fit: " + "\n  ".join(advice(found, config)), markup=False)
