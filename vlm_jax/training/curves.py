"""The learning curves of a run, drawn from its `metrics.jsonl`: RUN/curves.png."""

from __future__ import annotations

import math
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np

from vlm_jax.files import JsonError, parse_json, read_regular

NAME = "curves.png"
LEAST = 20  # steps: fewer make no curve
SMOOTH = 100  # the mean is over about so many parts of the run
MOST = 4000  # points that are drawn of a line
PANEL = (8.0, 2.4)  # inches
EVAL = "eval_"

Line = tuple[np.ndarray, np.ndarray]  # steps and values


def draw_curves(metrics: Path, target: Path) -> None:
    """The loss with its running mean and the held-out loss, the other held-out metrics, and the rate, one below the other.

    Metrics that an evaluation wrote together and that are shares share a panel; another one has its own. Nothing is drawn of a
    run of fewer than `LEAST` steps.

    Raises:
      OSError: the file cannot be read, or the picture not written.
    """
    training, held_out = read_metrics(metrics)
    if len(training.get("loss", ([],))[0]) < LEAST:
        return
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = _panels(held_out)
    figure = Figure(figsize=(PANEL[0], PANEL[1] * (2 + len(panels))), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2 + len(panels), sharex=True)
    _draw_loss(axes[0], training["loss"], held_out.get(("loss",), {}).get("loss"))
    for axis, (names, lines) in zip(axes[1:], panels, strict=False):
        for name, (steps, values) in zip(names, lines, strict=True):
            axis.plot(steps, values, marker="o", markersize=3.5, linewidth=1.2, label=name)
        axis.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), fontsize=8, frameon=False)
    steps, values = _fewer(*training["lr"])
    axes[-1].plot(steps, values, color="#555555", linewidth=1.2)
    axes[-1].set_ylabel("learning rate")
    axes[-1].set_xlabel("step")
    for axis in axes:
        axis.grid(alpha=0.3)
        if axis.get_yscale() == "linear":
            axis.ticklabel_format(axis="y", useOffset=False, scilimits=(-3, 4))
    figure.align_ylabels(axes)
    part = target.with_suffix(".part.png")
    figure.savefig(part, dpi=110)
    part.replace(target)


def read_metrics(path: Path) -> tuple[dict[str, Line], dict[tuple[str, ...], dict[str, Line]]]:
    """(training, held out): the first by name; the second by the names that were written together, then by name.

    `("loss",)` among the latter holds the objective's held-out loss alone. What is not a number has NaN.
    """
    training: dict[str, list[Any]] = defaultdict(list)
    groups: dict[tuple[str, ...], dict[str, list[Any]]] = {}
    for raw in read_regular(path).splitlines():
        try:
            line = parse_json(raw)
        except JsonError:
            continue  # of a run that was killed while it wrote
        step, names = line.pop("step"), tuple(line)
        if not names:
            continue
        found = training
        if names[0].startswith(EVAL):
            names = tuple(name.removeprefix(EVAL) for name in names)
            found = groups.setdefault(names, defaultdict(list))
        for name, value in zip(names, line.values(), strict=True):
            found[name].append((step, math.nan if value is None else value))
    held_out = {names: {name: _line(points) for name, points in group.items()} for names, group in groups.items()}
    for names, group in list(held_out.items()):
        if "loss" in names:
            held_out[("loss",)] = {"loss": group.pop("loss")}
    return {name: _line(points) for name, points in training.items()}, held_out


def running_mean(values: np.ndarray, *, over: int) -> np.ndarray:
    """An exponential mean of about so many of the last values, without the bias of its start; NaN counts for nothing."""
    keep = 1 - 1 / max(over, 1)
    out, total, weight = np.empty(len(values)), 0.0, 0.0
    for place, value in enumerate(values):
        total, weight = keep * total, keep * weight
        if np.isfinite(value):
            total, weight = total + value, weight + 1.0
        out[place] = total / weight if weight else math.nan
    return out


def _line(points: list[tuple[int, float]]) -> Line:
    steps, values = zip(*points, strict=True)
    return np.asarray(steps), np.asarray(values, float)


def _panels(held_out: dict[tuple[str, ...], dict[str, Line]]) -> list[tuple[list[str], list[Line]]]:
    """What stands together: names and lines. Whole numbers above 1 count examples, and are left out."""
    panels = []
    for names, group in held_out.items():
        if names == ("loss",):
            continue
        shares, others = [], []
        for name, (steps, values) in group.items():
            finite = values[np.isfinite(values)]
            if not len(finite) or (finite.max() > 1 and np.array_equal(finite, np.round(finite))):
                continue
            place = shares if finite.min() >= 0 and finite.max() <= 1 else others
            place.append((name, (steps, values)))
        panels += [
            ([name for name, _ in some], [line for _, line in some]) for some in (shares, *([one] for one in others)) if some
        ]
    return panels


def _draw_loss(axis: Any, training: Line, held_out: Line | None) -> None:
    steps, values = training
    mean = running_mean(values, over=len(values) // SMOOTH)
    axis.plot(*_fewer(steps, values), color="#9ec5e8", linewidth=0.8, label="loss")
    axis.plot(*_fewer(steps, mean), color="#1f5f99", linewidth=1.6, label="its mean")
    if held_out is not None:
        axis.plot(*held_out, color="#c0392b", marker="o", markersize=3.5, linewidth=1.2, label="held-out loss")
    finite = mean[np.isfinite(mean)]
    if len(finite) and finite.min() > 0 and finite.max() > 20 * finite.min():
        axis.set_yscale("log")
    axis.set_ylabel("loss")
    axis.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), fontsize=8, frameon=False)


def _fewer(steps: np.ndarray, values: np.ndarray) -> Line:
    """At most `MOST` points, the last one among them."""
    every = -(-len(steps) // MOST)
    chosen = np.unique(np.append(np.arange(0, len(steps), every), len(steps) - 1))
    return steps[chosen], values[chosen]
