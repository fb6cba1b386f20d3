"""Progress bars and times for the terminal."""

from __future__ import annotations

import contextlib
import math
import sys
import time
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def bytes_read(title: str) -> Iterator[Callable[[int, int], None]]:
    """A bar on a terminal's error output, gone when the work is done; gives what takes (bytes so far, bytes in all)."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task(title, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


class Countdown:
    """Says from time to time how much of a long piece of work is done, and how long the rest takes."""

    EVERY = 10.0  # seconds

    def __init__(self, say: Callable[[str], None], what: str, total: int, *, done: int = 0) -> None:
        """
        Args:
          what: is counted, and its unit: "tokenising: {} examples".
          done: of `total`, before this start.
        """
        self._say, self._what, self._total, self._start = say, what, total, done
        self._began = self._said = time.perf_counter()

    def at(self, done: int) -> None:
        now = time.perf_counter()
        if now - self._said < self.EVERY or done <= self._start:
            return
        self._said = now
        left = (now - self._began) / (done - self._start) * (self._total - done)
        self._say(f"{self._what.format(f'{done:,} of {self._total:,}')}, {human_time(left)} left")


def human_time(seconds: float) -> str:
    """75 -> "1:15", 7384 -> "2:03:04"."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def human_rate(value: float, unit: str) -> str:
    """1.5e10, "FLOP/s" -> "15.0 GFLOP/s"."""
    power = min(int(math.log10(max(value, 1.0)) // 3), 5)
    return f"{value / 1000**power:.3g} {['', 'k', 'M', 'G', 'T', 'P'][power]}{unit}"
