"""Published weights <-> our parameters, by a table (`table.py`); every name is accounted for in both directions."""

from __future__ import annotations

import itertools
from collections import defaultdict
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from vlm_jax.data.batch import Batch
from vlm_jax.interop.table import Axes, Row, Shape, Table, axes_of, pattern, written
from vlm_jax.models.vlm import VisionLanguageModel
from vlm_jax.sharding import Named

State = dict[str, np.ndarray]


class ConversionError(ValueError):
    """Names or shapes that do not fit; the message lists all of them."""


class _Problems:
    """What is wrong, gathered by kind so that one error can tell everything."""

    def __init__(self) -> None:
        self.found: dict[str, list[str]] = defaultdict(list)

    def add(self, kind: str, what: str) -> None:
        self.found[kind].append(what)

    def check(self) -> None:
        if self.found:
            lines = [
                f"{kind} ({len(found)}):\n" + "\n".join(f"    {what}" for what in found) for kind, found in self.found.items()
            ]
            raise ConversionError("the weights do not fit the model:\n  " + "\n  ".join(lines))


UNMATCHED = "published names that no row of the table knows; add a row, or an `ignored` one"
DOUBLE = "published names that are matched more than once; leave one out"
MISSING = "published names that the model needs and the weights do not have"
UNUSED = "published layers that the model does not have; check the number of layers in its config"
SHAPE = "wrong shapes; check the widths in the model's config"
DIFFERENT = "published copies that are not equal to their original; set tied_head=False in the model's config"
NO_PARAMETER = "rows whose parameter the model does not have; use the table of this model's config"
NO_ROW = "parameters that no row of the table makes; use the table of this model's config"


def abstract_params(model: VisionLanguageModel) -> Any:
    """Shapes and types of a model's parameters; nothing is computed."""
    vision = model.config.vision
    side = vision.image_size if vision else 1
    row = lambda dtype: np.zeros((1, 1), dtype)
    images = np.zeros((1, 1, 1, side, side, 3), np.uint8)
    batch = Batch(images, row(np.int32), *(row(np.int32) for _ in range(6)), row(np.float32))
    boxed = jax.eval_shape(model.init, jax.random.key(0), batch)["params"]
    return jax.tree.map(lambda box: box.value, boxed, is_leaf=lambda x: isinstance(x, Named))


def to_ours(state: State, table: Table, abstract_params: Any) -> Any:
    """Published weights -> our parameters, in the type they come in.

    Args:
      abstract_params: our parameters or their shapes.

    Raises:
      ConversionError: a name or a shape does not fit; it lists all of them.
    """
    problems = _Problems()
    shapes = {path: tuple(leaf.shape) for path, leaf in flatten_dict(abstract_params, sep="/").items()}
    names = _match(state, table, problems)
    params: dict[str, np.ndarray] = {}
    for number, row, axes, layers in _resolved(table, shapes, problems):
        for (other, _, layer), name in names.items():
            if other == number and layer is not None and layer >= layers:
                problems.add(UNUSED, f"{name}: the model has {layers} layers")
        pieces: list[list[np.ndarray]] = []
        for layer in [None] if layers is None else range(layers):
            parts = []
            for part, template in enumerate(row.published):
                name = names.get((number, part, layer))
                if name is None:
                    problems.add(MISSING, f"{written(template, layer)} (for {', '.join(row.ours)})")
                elif _fits(name, state[name].shape, _expected(row, axes, part), problems):
                    parts.append(np.asarray(state[name]))
            if len(parts) == len(row.published):
                pieces.append(_convert(parts, axes))
        for place, path in enumerate(row.ours):
            if len(pieces) == (layers or 1):
                params[path] = pieces[0][place] if layers is None else np.stack([piece[place] for piece in pieces])
    for copy in table.copies:
        for name, of in itertools.product(*([n for n in state if pattern(t).fullmatch(n)] for t in (copy.name, copy.of))):
            if not np.array_equal(state[name], state[of]):
                problems.add(DIFFERENT, f"{name} and {of}")
    problems.check()
    return unflatten_dict(params, sep="/")


def to_published(params: Any, table: Table) -> State:
    """The inverse of `to_ours`, without the ignored names and the copies.

    Raises:
      ConversionError: a parameter has no row or a row no parameter; it lists all of them.
    """
    problems = _Problems()
    flat = {path: np.asarray(leaf) for path, leaf in flatten_dict(params, sep="/").items()}
    state: State = {}
    for _, row, axes, layers in _resolved(table, {path: leaf.shape for path, leaf in flat.items()}, problems):
        for layer in [None] if layers is None else range(layers):
            ours = [flat[path] if layer is None else flat[path][layer] for path in row.ours]
            whole = [a.to_published(x) for a, x in zip(axes, ours, strict=True)]
            joined = whole[0] if len(whole) == 1 else np.concatenate(whole)
            for part, template in enumerate(row.published):
                start, stop = (sum(row.split[:end]) for end in (part, part + 1)) if row.split else (0, None)
                state[written(template, layer)] = joined[start:stop] if row.split else joined
    problems.check()
    return state


def _match(state: State, table: Table, problems: _Problems) -> dict[tuple[int, int, int | None], str]:
    """(row, which of its published tensors, layer) -> name."""
    rows = [(pattern(name), (r, p)) for r, row in enumerate(table.rows) for p, name in enumerate(row.published)]
    left_out = [pattern(name) for name in (*table.ignored, *(copy.name for copy in table.copies))]
    names: dict[tuple[int, int, int | None], str] = {}
    for name in sorted(state):
        hits = [(match, place) for regex, place in rows if (match := regex.fullmatch(name))]
        skipped = sum(regex.fullmatch(name) is not None for regex in left_out)
        if len(hits) + skipped != 1:
            problems.add(DOUBLE if hits or skipped else UNMATCHED, f"{name} {state[name].shape}")
        elif hits:
            match, place = hits[0]
            key = (*place, int(match[1]) if match.groups() else None)
            if key in names:
                problems.add(DOUBLE, f"{names[key]} and {name}")
            names[key] = name
    return names


def _resolved(table: Table, shapes: dict[str, Shape], problems: _Problems) -> list[tuple[int, Row, list[Axes], int | None]]:
    """The rows with the sizes of their axes and the number of layers (None: not stacked)."""
    resolved = []
    made: dict[str, int] = defaultdict(int)
    for number, row in enumerate(table.rows):
        stacked = "{}" in row.published[0]
        for path in row.ours:
            made[path] += 1
            if path not in shapes:
                problems.add(NO_PARAMETER, path)
        known = [shapes[path] for path in row.ours if path in shapes]
        if len(known) < len(row.ours):
            continue
        try:
            axes = [axes_of(row.axes, shape[1:] if stacked else shape, row.sizes) for shape in known]
        except ValueError as error:
            problems.add(SHAPE, f"{', '.join(row.ours)}: {error}")
            continue
        total = sum(a.shape[0] for a in axes) if row.split else 0
        if total != sum(row.split):
            problems.add(SHAPE, f"{', '.join(row.ours)}: {total} rows, and the table splits them into {row.split}")
            continue
        resolved.append((number, row, axes, known[0][0] if stacked else None))
    for path in shapes:
        if not made[path]:
            problems.add(NO_ROW, path)
        elif made[path] > 1:
            problems.add(DOUBLE, f"our {path}, by {made[path]} rows")
    return resolved


def _expected(row: Row, axes: list[Axes], part: int) -> Shape:
    """The shape of one published tensor of a row."""
    first = row.split[part] if row.split else sum(a.shape[0] for a in axes) if axes[0].shape else None
    return () if first is None else (first, *axes[0].shape[1:])


def _fits(name: str, found: Shape, expected: Shape, problems: _Problems) -> bool:
    if tuple(found) != expected:
        problems.add(SHAPE, f"{name}: found {tuple(found)}, expected {expected}")
    return tuple(found) == expected


def _convert(parts: list[np.ndarray], axes: list[Axes]) -> list[np.ndarray]:
    """The published tensors of one layer of a row -> ours."""
    whole = parts[0] if len(parts) == 1 else np.concatenate(parts)
    if len(axes) == 1:
        return [axes[0].to_ours(whole)]
    ends = np.cumsum([a.shape[0] for a in axes])[:-1]
    return [a.to_ours(piece) for a, piece in zip(axes, np.split(whole, ends), strict=True)]
