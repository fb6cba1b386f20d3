"""Run logging: a line on the terminal, a line per step in `metrics.jsonl`, and TensorBoard."""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
from rich.console import Console
from tensorboardX import SummaryWriter


class Reporter:
    """Writes on the first process, and is silent on the others.

    `metrics.jsonl` holds numbers that depend on the training alone, so that a resumed run's lines equal an undisturbed one's;
    how fast it went stands on the terminal and in TensorBoard.
    """

    def __init__(self, folder: Path, first_step: int) -> None:
        self.active = jax.process_index() == 0
        self.console = Console(highlight=False, soft_wrap=True, quiet=not self.active)
        if not self.active:
            return
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / "metrics.jsonl"
        _truncate_metrics(self.path, first_step)
        self.file = self.path.open("a")
        self.board = SummaryWriter(str(folder / "tensorboard"), purge_step=first_step)

    def say(self, text: str) -> None:
        self.console.print(text, markup=False)

    def record(self, step: int, metrics: dict[str, Any], prefix: str = "") -> None:
        """One line of `metrics.jsonl`, flushed by `flush`."""
        if not self.active:
            return
        named = {f"{prefix}{name}": value for name, value in metrics.items()}
        # JSON has no NaN; a loss that is not finite is written as null.
        clean = {name: value if math.isfinite(value) else None for name, value in named.items()}
        self.file.write(json.dumps({"step": step} | clean) + "\n")

    def plot(self, step: int, metrics: dict[str, float]) -> None:
        """To TensorBoard alone."""
        if self.active:
            for name, value in metrics.items():
                self.board.add_scalar(name, value, step)

    def flush(self) -> None:
        if self.active:
            self.file.flush()
            self.board.flush()

    def close(self) -> None:
        if self.active:
            self.file.close()
            self.board.close()


def _truncate_metrics(path: Path, step: int) -> None:
    """Drops the lines of steps that will be repeated, and an incomplete last line."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines(keepends=True):
        try:
            if line.endswith("\n") and json.loads(line)["step"] <= step:
                kept.append(line)
        except (ValueError, KeyError):
            continue
    part = path.with_suffix(".part")
    part.write_text("".join(kept))
    part.replace(path)


class StepTimer:
    """Time since the last call of `elapsed`, without the time within `pause` (evaluation, saving)."""

    def __init__(self) -> None:
        self.began = time.perf_counter()

    def elapsed(self) -> float:
        """Seconds of the lap that ends now."""
        now = time.perf_counter()
        seconds, self.began = now - self.began, now
        return max(seconds, 1e-9)

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        entered = time.perf_counter()
        yield
        self.began += time.perf_counter() - entered
