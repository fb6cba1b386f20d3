"""The text of a compiled program, as XLA prints it for CPUs, GPUs and TPUs: its computations and their instructions."""

from __future__ import annotations

import dataclasses
import math
import re

SIZES = {"pred": 1, "token": 0, "opaque": 0} | {
    f"{kind}{bits}": bits / 8 for kind in ("s", "u", "f", "bf", "c") for bits in (2, 4, 8, 16, 32, 64, 128)
}
COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute", "collective-broadcast")


@dataclasses.dataclass(frozen=True)
class Instruction:
    name: str
    opcode: str
    bytes: float  # of the result
    operands: tuple[str, ...]
    inside: str  # what stands between its parentheses
    attributes: str
    root: bool

    @property
    def calls(self) -> tuple[str, ...]:
        """The computations that it runs."""
        found = re.findall(
            r"(?:calls|body|condition|to_apply|true_computation|false_computation)=%?([\w.\-]+)", self.attributes
        )
        for several in re.findall(r"(?:branch_computations|called_computations)=\{([^}]*)\}", self.attributes):
            found += re.findall(r"%?([\w.\-]+)", several)
        return tuple(found)

    @property
    def number(self) -> int | None:
        """Of a constant that is a whole number."""
        return int(self.inside) if self.opcode == "constant" and re.fullmatch(r"-?\d+", self.inside) else None

    @property
    def condition(self) -> str:
        """The computation that says whether a loop goes on."""
        return re.search(r"condition=%?([\w.\-]+)", self.attributes)[1]

    @property
    def collective(self) -> str:
        """Its kind, of one of `COLLECTIVES`, or of its beginning where it runs beside others; "": it is none."""
        name = self.opcode.removesuffix("-start")
        return name if name in COLLECTIVES else ""


def read_computations(text: str) -> tuple[dict[str, list[Instruction]], str]:
    """The instructions of every computation by its name, and the name of the one that is entered."""
    computations: dict[str, list[Instruction]] = {}
    entry, current = "", None
    for line in text.splitlines():
        if current is None:
            head = re.match(r"(ENTRY )?%?([\w.\-]+)\s*\(.*->.*\{\s*$", line)
            if head:
                current = computations.setdefault(head[2], [])
                entry = head[2] if head[1] else entry
        elif line.startswith("}"):
            current = None
        elif found := _instruction(line):
            current.append(found)
    return computations, entry


def _instruction(line: str) -> Instruction | None:
    found = re.match(r"\s*(ROOT )?%?([\w.\-]+) = (.*)$", line)
    if not found:
        return None
    rest = found[3]
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.find(" ")
    shape, rest = rest[:end], rest[end:].lstrip()
    opcode, bracket, _ = rest.partition("(")
    if not bracket or not re.fullmatch(r"[\w\-]+", opcode):
        return None
    close = _closing(rest, len(opcode))
    operands = tuple(re.findall(r"%([\w.\-]+)", rest[len(opcode) : close]))
    inside = rest[len(opcode) + 1 : close]
    size = _bytes(shape, start=opcode.endswith("-start"))
    return Instruction(found[2], opcode, size, operands, inside, rest[close:], bool(found[1]))


def _closing(text: str, opening: int) -> int:
    depth = 0
    for place in range(opening, len(text)):
        depth += (text[place] == "(") - (text[place] == ")")
        if not depth:
            return place
    return len(text)


def _bytes(shape: str, *, start: bool) -> float:
    """Of a shape as the text has it.

    Args:
      start: of an operation whose result comes later: its shape holds that of the operand first, and then the result's.
    """
    parts = [
        SIZES.get(kind, 0) * math.prod(int(size) for size in sizes.split(",") if size)
        for kind, sizes in re.findall(r"\b([a-z]+\d*)(?:e\dm\d\w*)?\[([\d,]*)\]", shape)
    ]
    return max(parts, default=0.0) if start else sum(parts)
