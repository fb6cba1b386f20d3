"""Run logging: a line on the terminal, a line per step in `metrics.jsonl`, the boards, and the curves in the end."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from PIL import Image
from rich.console import Console

from vlm_jax.config import RunConfig
from vlm_jax.files import JsonError, parse_json, read_regular
from vlm_jax.training.boards import Board, TensorBoard, WandbBoard
from vlm_jax.training.curves import NAME, draw_curves

log = logging.getLogger(__name__)


class Reporter:
    """Writes on the first process, and is silent on the others.

    `metrics.jsonl` holds numbers that depend on the training alone, so that a resumed run's lines equal an undisturbed one's;
    how fast it went stands on the terminal and in TensorBoard.
    """

    def __init__(self, folder: Path, first_step: int, *, config: RunConfig) -> None:
        """
        Raises:
          OSError: the folder cannot be written; ValueError: a board whose package is not installed.
        """
        self.active = jax.process_index() == 0
        self.console = Console(highlight=False, soft_wrap=True, quiet=not self.active)
        if not self.active:
            return
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / "metrics.jsonl"
        with self._writes():
            _truncate_metrics(self.path, first_step)
            self.file = self.path.open("a")
            self.boards: list[Board] = [TensorBoard(folder, first_step)]
        if config.wandb:
            self.boards.append(WandbBoard(folder, config))

    def say(self, text: str) -> None:
        self.console.print(text, markup=False)

    def record(self, step: int, metrics: dict[str, Any], prefix: str = "") -> None:
        """One line of `metrics.jsonl`, flushed by `flush`."""
        if not self.active:
            return
        named = {f"{prefix}{name}": value for name, value in metrics.items()}
        # JSON has no NaN; a loss that is not finite is written as null.
        clean = {name: value if math.isfinite(value) else None for name, value in named.items()}
        with self._writes():
            self.file.write(json.dumps({"step": step} | clean) + "\n")

    def plot(self, step: int, metrics: dict[str, float]) -> None:
        """To the boards alone."""
        if self.active:
            with self._writes():
                for board in self.boards:
                    board.plot(step, metrics)

    def show(self, step: int, name: str, *, pictures: dict[str, np.ndarray], texts: dict[str, str]) -> None:
        """What an evaluator called `name` has to be looked at: to the boards.

        Args:
          pictures: [height, width, 3] uint8 by name; that of "" is also written to RUN/NAME/step-000500.png.
          texts: Markdown by name.
        """
        if not self.active:
            return
        with self._writes():
            if "" in pictures:
                path = self.path.parent / name / f"step-{step:06}.png"
                path.parent.mkdir(exist_ok=True)
                Image.fromarray(pictures[""]).save(path)
            full = lambda parts: {"/".join(filter(None, (name, part))): value for part, value in parts.items()}
            for board in self.boards:
                board.show(step, pictures=full(pictures), texts=full(texts))

    def flush(self) -> None:
        if self.active:
            with self._writes():
                self.file.flush()
                for board in self.boards:
                    board.flush()

    def close(self) -> None:
        if self.active:
            with self._writes():
                self.file.close()
                for board in self.boards:
                    board.close()
            try:
                draw_curves(self.path, self.path.with_name(NAME))
            except Exception as error:  # the run is over, whatever becomes of its picture
                log.warning("%s could not be drawn: %s", self.path.with_name(NAME), error)

    @contextlib.contextmanager
    def _writes(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise OSError(
                f"metrics cannot be written into {self.path.parent} ({error.strerror or error}). Mend the cause and run the "
                "same command again to resume"
            ) from error


def _truncate_metrics(path: Path, step: int) -> None:
    """Drops the lines of steps that will be repeated, and an incomplete last line.

    Raises:
      OSError: the file cannot be read or written.
    """
    try:
        lines = read_regular(path).split(b"\n")[:-1]
    except FileNotFoundError:
        return
    kept, odd = [], []
    for number, line in enumerate(lines, 1):
        at = _step_of(line)
        if at is None:
            odd.append(number)
        elif at <= step:
            kept.append(line + b"\n")
    if odd:
        log.warning("%s: %d lines are no metrics and are dropped, the first is line %d", path, len(odd), odd[0])
    part = path.with_suffix(".part")
    part.write_bytes(b"".join(kept))
    part.replace(path)


def _step_of(line: bytes) -> int | None:
    try:
        step = parse_json(line)["step"]
    except (JsonError, KeyError, TypeError, IndexError):
        return None
    return step if isinstance(step, int) else None


class _OneLine(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        kind = f"{record.levelname.lower()}: " if record.levelno >= logging.WARNING else ""
        return kind + (record.getMessage().splitlines() or [""])[0]


def _without_traceback(record: logging.LogRecord) -> bool:
    return not record.exc_info


def _log_uncaught(args: Any) -> None:
    log.error("raised in a thread", exc_info=(args.exc_type, args.exc_value, args.exc_traceback))


@contextlib.contextmanager
def logged(path: Path) -> Iterator[None]:
    """Warnings and errors go to a file. The terminal shows a line of each, and none of those that have a traceback: whoever
    raises in the end says it in a line and names the file."""
    root, before = logging.getLogger(), (sys.unraisablehook, threading.excepthook)
    file = logging.FileHandler(path, delay=True)
    file.setLevel(logging.WARNING)
    file.handleError = lambda record: None  # where the disk is full, what is raised in the end says so
    file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    shown = {handler: handler.formatter for handler in root.handlers}
    for handler in shown:
        handler.setFormatter(_OneLine())
        handler.addFilter(_without_traceback)
    root.addHandler(file)
    logging.captureWarnings(True)
    # Threads of TensorStore and Orbax, whose errors reach the main thread as well.
    sys.unraisablehook = threading.excepthook = _log_uncaught
    try:
        yield
    finally:
        sys.unraisablehook, threading.excepthook = before
        logging.captureWarnings(False)
        root.removeHandler(file)
        with contextlib.suppress(OSError):
            file.close()
        for handler, formatter in shown.items():
            handler.setFormatter(formatter)
            handler.removeFilter(_without_traceback)


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
