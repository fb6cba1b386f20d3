"""Adapters alone, in the format of Hugging Face's PEFT: `adapter_config.json` and `adapter_model.safetensors`.

    base_model.model.model.language_model.layers.0.self_attn.q_proj.lora_A.weight   [rank, inputs]
    base_model.model.model.language_model.layers.0.self_attn.q_proj.lora_B.weight   [outputs, rank]
    base_model.model.model.multi_modal_projector.linear_1.weight                    of `modules_to_save`: in the base's place

Names are those of the published family, by its table, as its modules are called in memory. A model without a published family
has names of its own, `own_table`. LLaVA's `non_lora_trainables.bin` has further names of the last kind.
"""

from __future__ import annotations

import dataclasses
import math
import re
import string
from collections.abc import Mapping, Sequence
from typing import Any

from vlm_jax.interop.files.source import PublishedError
from vlm_jax.interop.table import Axes, Row, Shape, Table, axes_of, pattern, row
from vlm_jax.sharding import Named

CONFIG, WEIGHTS, PICKLE, OTHERS = (
    "adapter_config.json",
    "adapter_model.safetensors",
    "adapter_model.bin",
    "non_lora_trainables.bin",
)
PREFIX = "base_model.model."
HALVES = {".lora_A.weight": "a", ".lora_B.weight": "b"}


@dataclasses.dataclass(frozen=True)
class LinearMap:
    """A linear map of the published model: one of ours, or several that it has fused."""

    row: Row
    modules: tuple[str, ...]  # our paths
    halves: Mapping[str, Axes]  # of A and B for a rank of 1, published <-> ours
    counts: Shape

    def of_rank(self, half: str, rank: int) -> Axes:
        return dataclasses.replace(self.halves[half], sizes=self.halves[half].sizes | {self.letter: rank})

    @property
    def letter(self) -> str:
        return _free_letter(self.row)


def own_table(boxes: Mapping[str, Any]) -> Table:
    """Our own names in the published form: `language/layers/mlp/up/kernel` is `language.layers.{}.mlp.up.weight`."""
    rows = []
    for path, box in boxes.items():
        names = box.names if isinstance(box, Named) else (None,) * box.ndim
        stacked = bool(names) and names[0] == "layers"
        letters = string.ascii_uppercase.replace("J", "")[: len(names) - stacked]
        inputs = getattr(box, "inputs", 0)
        published = path.replace("/layers/", "/layers/{}/", 1) if stacked else path
        if inputs:
            published = f"{published.removesuffix('/kernel')}/weight"
            sides = [letters[inputs:], letters[:inputs]]
        else:
            sides = list(letters)
        axes = " ".join(f"({' '.join(side)})" if len(side) > 1 else side for side in sides)
        rows.append(row(published.replace("/", "."), path, f"{axes} -> {' '.join(letters)}"))
    return Table(tuple(rows))


def memory_name(template: str) -> str:
    """A published name of a row as transformers has it in memory: the spelling with `model.` before the file's first part.

    Parts of a larger model are written under their own prefix and held under `model.`.
    """

    def chosen(match: re.Match[str]) -> str:
        spellings = match[0][1:-1].split("|")
        if len(spellings) == 1:
            return ""
        inside = [name for name in spellings if name.startswith(f"model.{spellings[0].split('.')[0]}")]
        return min(inside or spellings, key=len)

    return re.sub(r"\[.*?\]", chosen, template)


def base_name(key: str) -> str:
    """A name in an adapter's file -> that of the base model's tensor."""
    name = key.removeprefix(PREFIX)
    for end in HALVES:
        name = f"{name.removesuffix(end)}.weight" if name.endswith(end) else name
    return name


def row_of(table: Table, name: str) -> tuple[Row, Shape] | None:
    for one in table.rows:
        for template in one.published:
            if match := pattern(template).fullmatch(name):
                return one, tuple(map(int, match.groups()))
    return None


def _free_letter(one: Row) -> str:
    return next(letter for letter in reversed(string.ascii_uppercase) if letter not in one.axes and letter != "J")


def map_of(one: Row, boxes: Mapping[str, Any], where: str) -> LinearMap:
    """
    Raises:
      PublishedError: not a linear map, or one whose published inputs do not stand last.
    """
    of_row = [boxes[path] for path in one.ours]
    inputs = getattr(of_row[0], "inputs", 0)
    if not inputs or len(one.published) > 1:
        raise PublishedError(f"{where}: {one.published[0]} is no linear map of the model: adapters of it are not implemented")
    shape = of_row[0].value.shape
    axes = axes_of(one, shape[one.counted :])
    ours_in, ours_out = axes.ours[:inputs], axes.ours[inputs:]
    letters = lambda groups: sorted(letter for group in groups for letter in group if letter != "J")
    if len(axes.published) != 2 or letters(axes.published[1:]) != letters(ours_in):
        raise PublishedError(f"{where}: {one.published[0]}: its inputs do not stand last: adapters of it are not implemented")
    rank = [_free_letter(one)]
    sizes = axes.sizes | {rank[0]: 1}
    halves = {
        "a": Axes([rank, axes.published[1]], [*ours_in, rank], _only(sizes, [rank, *ours_in])),
        "b": Axes([axes.published[0], rank], [rank, *ours_out], _only(sizes, [rank, axes.published[0]])),
    }
    return LinearMap(one, tuple(path.removesuffix("/kernel") for path in one.ours), halves, shape[: one.counted])


def _only(sizes: Mapping[str, int], groups: Sequence[Sequence[str]]) -> dict[str, int]:
    return {letter: sizes[letter] for group in groups for letter in group}


def our_shape(axes: Axes) -> Shape:
    return tuple(math.prod(axes.sizes[letter] for letter in group) for group in axes.ours)
