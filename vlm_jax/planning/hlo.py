"""A compiled program, read from its text: how often each instruction runs, and what it moves between devices and from memory.

`cost_analysis()` counts the body of a loop once. The text says how often a loop runs, and for collectives which devices take
part.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections import defaultdict
from collections.abc import Iterator

import numpy as np
from jax.sharding import Mesh

from vlm_jax.planning.hlo_text import COLLECTIVES, Instruction, read_computations

# What is no work: names for parts of what is there, or the work of the instructions within.
FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call", "after-all", "iota"}
FREE |= {"partition-id", "replica-id", "opt-barrier", "domain", "copy-start", "copy-done", "async-start", "async-update"}
FREE |= {"async-done"} | {f"{name}-done" for name in COLLECTIVES}
SLICES = ("dynamic-slice", "slice", "gather")  # of the first operand they read what they give
RENAMES = ("bitcast", "reshape")


class Program:
    """The computations of a compiled program, by name, and how often each runs.

    Attributes:
      unknown_loops: the number of loops whose text does not say how often they run; they count once.
    """

    def __init__(self, text: str) -> None:
        self.computations, self.entry = read_computations(text)
        loops = [one for one in self._all() if one.opcode == "while"]
        self.unknown_loops = sum(self.trips(one) is None for one in loops)

    def _all(self) -> Iterator[Instruction]:
        for several in self.computations.values():
            yield from several

    def trips(self, loop: Instruction) -> int | None:
        """How often the body of a loop runs; None: only the data say.

        CPUs and GPUs are told by the loop, and for TPUs its condition compares a counter, from 0 on, with a constant.
        """
        if found := re.search(r'known_trip_count"?:\{"?n"?:"?(\d+)', loop.attributes):
            return int(found[1])
        body = self.computations.get(loop.condition, [])
        root = next((one for one in body if one.root), None)
        numbers = {one.name: one.number for one in body}
        if root is not None and root.opcode == "fusion":
            inner = self.computations.get(root.calls[0], [])
            given = {one.name: numbers.get(root.operands[int(one.inside)]) for one in inner if one.opcode == "parameter"}
            numbers = {one.name: one.number for one in inner} | given
            root = next((one for one in inner if one.root), None)
        if root is None or root.opcode != "compare" or "direction=LT" not in root.attributes:
            return None
        return numbers.get(root.operands[1])

    @functools.cached_property
    def runs(self) -> dict[str, int]:
        """How often each computation runs in one run of the program."""
        times: dict[str, int] = defaultdict(int)
        times[self.entry] = 1
        for name in self._in_order():
            for one in self.computations[name]:
                trips = (self.trips(one) or 1) if one.opcode == "while" else 1
                for called in one.calls:
                    if called in self.computations:
                        times[called] += times[name] * trips
        return dict(times)

    def _in_order(self) -> list[str]:
        """Computations before those they call."""
        done: list[str] = []
        seen: set[str] = set()

        def visit(name: str) -> None:
            if name in seen or name not in self.computations:
                return
            seen.add(name)
            for one in self.computations[name]:
                for called in one.calls:
                    visit(called)
            done.append(name)

        visit(self.entry)
        return done[::-1]

    def _sizes(self, computation: str) -> dict[str, float]:
        """Bytes of the result of each instruction."""
        return {one.name: one.bytes for one in self.computations[computation]}

    @functools.cached_property
    def _fused(self) -> set[str]:
        """Computations within a fusion, or that a reduction applies: what they hold never reaches memory."""
        by_itself = ("while", "call", "conditional")
        return {called for one in self._all() if one.opcode not in by_itself for called in one.calls}

    def executed(self) -> Iterator[tuple[Instruction, int]]:
        """Every instruction that is run by itself, and how often."""
        for name, times in self.runs.items():
            if name not in self._fused:
                for one in self.computations[name]:
                    yield one, times

    def memory_bytes(self) -> float:
        """Bytes that a device reads from its memory and writes to it, as if every instruction began with empty caches."""
        total = 0.0
        for name, times in self.runs.items():
            if name in self._fused:
                continue
            sizes = self._sizes(name)
            for one in self.computations[name]:
                if one.opcode not in FREE:
                    total += times * self._moved(one, sizes)
        return total

    def _moved(self, one: Instruction, sizes: dict[str, float]) -> float:
        """Bytes of one instruction: of a stack that it slices or writes into, only the part."""
        operands = [sizes.get(name, 0.0) for name in one.operands]
        if one.opcode == "fusion":
            return sum(_traffic(self.computations.get(called, []), operands) for called in one.calls)
        if one.opcode == "dynamic-update-slice":
            return 2 * operands[1]
        return 2 * one.bytes if one.opcode in SLICES else one.bytes + sum(operands)

    def collectives(self, mesh: Mesh) -> list[Collective]:
        """What devices send each other, by kind and mesh axes, largest first."""
        found: dict[tuple[str, str], list[float]] = defaultdict(lambda: [0, 0.0])
        for name, times in self.runs.items():
            sizes = self._sizes(name)
            for one in self.computations[name]:
                if not one.collective:
                    continue
                axes, group = _axes(one.attributes, mesh)
                sent = _sent(one, sum(sizes.get(operand, 0.0) for operand in one.operands), group)
                total = found[(one.collective, axes)]
                total[0] += times
                total[1] += times * sent
        made = [Collective(kind, axes, int(count), sent) for (kind, axes), (count, sent) in found.items()]
        return sorted(made, key=lambda one: -one.bytes)


def _traffic(inner: list[Instruction], operands: list[float]) -> float:
    """Bytes that a fusion reads and writes.

    Args:
      operands: bytes of each of its parameters.
    """
    by_name = {one.name: one for one in inner}
    users: dict[str, list[Instruction]] = defaultdict(list)
    for one in inner:
        for operand in one.operands:
            users[operand].append(one)

    def used(name: str) -> list[tuple[Instruction, bool]]:
        """What reads it, by whatever name, and whether as the first operand."""
        found = []
        for user in users[name]:
            found += used(user.name) if user.opcode in RENAMES else [(user, user.operands[0] == name)]
        return found

    def written(one: Instruction) -> float:
        while one.opcode in RENAMES and one.operands[0] in by_name:
            one = by_name[one.operands[0]]
        if one.opcode == "tuple":
            return sum(written(by_name[name]) for name in one.operands)
        in_place = one.opcode == "dynamic-update-slice" and one.operands[1] in by_name
        return by_name[one.operands[1]].bytes if in_place else one.bytes

    total = sum(written(one) for one in inner if one.root)
    for one in inner:
        if one.opcode != "parameter":
            continue
        whole = operands[int(one.inside)] if int(one.inside) < len(operands) else one.bytes
        parts = [
            0.0 if user.opcode == "dynamic-update-slice" else user.bytes
            for user, first in used(one.name)
            if first and user.opcode in (*SLICES, "dynamic-update-slice")
        ]
        total += min(whole, sum(parts)) if len(parts) == len(used(one.name)) else whole
    return total


@dataclasses.dataclass(frozen=True)
class Collective:
    """Collectives of one kind over the same mesh axes, of one run of a program."""

    kind: str
    axes: str  # "fsdp", "data*fsdp"; "": within a device
    count: int
    bytes: float  # that a device sends


def _sent(one: Instruction, operands: float, group: int) -> float:
    """Bytes that a device sends in a ring."""
    share = (group - 1) / group if group else 0.0
    match one.collective:
        case "all-reduce":
            return 2 * one.bytes * share
        case "all-gather" | "all-to-all":
            return one.bytes * share
        case "reduce-scatter":
            return operands * share
        case _:
            return one.bytes


def _axes(attributes: str, mesh: Mesh) -> tuple[str, int]:
    """The mesh axes that the devices of a collective differ in, and how many devices take part together."""
    groups = _groups(attributes, mesh.size)
    differing = [False] * len(mesh.axis_names)
    for group in groups:
        places = np.stack(np.unravel_index(np.asarray(group), mesh.devices.shape))
        differing = [one or bool(np.ptp(axis)) for one, axis in zip(differing, places, strict=True)]
    names = [name for name, one in zip(mesh.axis_names, differing, strict=True) if one]
    return "*".join(names), len(groups[0]) if groups else 1


def _groups(attributes: str, devices: int) -> list[list[int]]:
    if found := re.search(r"source_target_pairs=\{(.*?)\}\}", attributes):
        pairs = re.findall(r"\{?(\d+),(\d+)", found[1])
        return [[int(a), int(b)] for a, b in pairs]
    if found := re.search(r"replica_groups=\[([\d,]+)\]<=(\[[\d,]+\](?:T\([\d,]+\))?)", attributes):
        return _numbers(found[2]).reshape([int(size) for size in found[1].split(",")]).tolist()
    if found := re.search(r"replica_groups=mesh\[(.*?)\](?:, device_ids=\((.*?)\))? \{(.*?)\}", attributes):
        sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", found[1])}
        numbers = _numbers(found[2]) if found[2] else np.arange(math.prod(sizes.values()))
        kept = re.findall(r"'(\w+)'", found[3])
        if ":" in found[3]:
            raise ValueError(f"parts of an axis in {found[0]}: this spelling of devices is not known")
        order = [list(sizes).index(name) for name in (*(name for name in sizes if name not in kept), *kept)]
        together = math.prod(sizes[name] for name in kept)
        return numbers.reshape(tuple(sizes.values())).transpose(order).reshape(-1, together).tolist()
    if found := re.search(r"replica_groups=\{(\{.*?\})\}", attributes):
        return [[int(number) for number in group.split(",")] for group in re.findall(r"\{([\d,]+)\}", found[1])]
    return [list(range(devices))]


def _numbers(text: str) -> np.ndarray:
    """`[4,2]T(1,0)`: the numbers of 4 x 2 devices, transposed, one after the other."""
    found = re.fullmatch(r"\[([\d,]+)\](?:T\(([\d,]+)\))?", text)
    source = [int(size) for size in found[1].split(",")]
    numbers = np.arange(math.prod(source)).reshape(source)
    return (numbers.transpose([int(axis) for axis in found[2].split(",")]) if found[2] else numbers).reshape(-1)


def estimated_cycles(program: Program) -> float | None:
    """The cycles that the TPU compiler expects of a core, over all instructions; None: the text has none."""
    total, seen = 0.0, False
    for one, times in program.executed():
        if found := re.search(r'estimated_cycles"?:"?(\d+)', one.attributes):
            total, seen = total + times * int(found[1]), True
    return total if seen else None
