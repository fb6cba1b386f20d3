"""Ctrl-C and SIGTERM. Before the first step a signal exits at once; afterwards the loop finishes the step, saves and exits.

Python runs its signal handlers between two of its own instructions, so that a compilation or a long step would keep a signal
waiting. `handle_signals` therefore listens beside the main thread, where the process is the trainer's own (train.py).
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from types import FrameType

PATIENCE_S = 1.0  # how long the main thread may take to end a start

_DEFERRING: Interrupt | None = None  # of the run whose steps have begun
_REPORTED = threading.Event()  # the message about the interrupted start was printed
_STEPS_DONE = threading.Event()  # training steps were run, and are over


class Interrupted(KeyboardInterrupt):
    """A signal came before the first step. It is no `Exception`: nobody takes it for a damaged file, for example."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.signal = number

    def __str__(self) -> str:
        return f"{signal.Signals(self.signal).name} before the first step; run the same command again to resume"


class Interrupt:
    """`with Interrupt() as interrupt:` remembers the first signal after `defer_signals`; a second Ctrl-C interrupts at once.

    Raises:
      Interrupted: a signal before `defer_signals`.
    """

    def __init__(self) -> None:
        self.signal: int | None = None

    def __enter__(self) -> Interrupt:
        _REPORTED.clear()
        _STEPS_DONE.clear()
        self.before = {number: signal.signal(number, self._on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *error: object) -> None:
        global _DEFERRING
        if _DEFERRING is self:
            _STEPS_DONE.set()
        _DEFERRING = None
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def defer_signals(self) -> None:
        """From now on the loop is asked to stop, so that it can save."""
        global _DEFERRING
        _DEFERRING = self

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if _DEFERRING is not self:
            _end_start(number, frame)
        if self.signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = number

    def should_stop(self, *, agree: bool) -> bool:
        """Whether to stop. Several processes stop at the same step: they are asked only where `agree` is true on all."""
        import jax  # not above: `handle_signals` begins before what takes long to import

        if jax.process_count() == 1:
            return self.signal is not None
        if not agree:
            return False
        from jax.experimental import multihost_utils

        self.signal = int(multihost_utils.process_allgather(self.signal or 0).max()) or None
        return self.signal is not None


def handle_signals() -> None:
    """For the rest of the process, which is train.py's: says at once that a signal came, and ends a start that does not end by
    itself, because it compiles for example."""
    read, write = os.pipe()
    os.set_blocking(write, False)
    signal.set_wakeup_fd(write, warn_on_full_buffer=False)
    threading.Thread(target=_listen, args=(read,), daemon=True).start()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _end_process)


def _listen(read: int) -> None:
    while byte := os.read(read, 1):
        if byte[0] not in (signal.SIGINT, signal.SIGTERM):
            continue
        name = signal.Signals(byte[0]).name
        if _DEFERRING is not None:
            print(f"{name}: finishing and saving the current step first", file=sys.stderr, flush=True)
            continue
        # Everything that a start leaves on disk is complete or can be resumed, so it may end anywhere.
        time.sleep(PATIENCE_S)
        if _DEFERRING is None and not _STEPS_DONE.is_set():
            _report(byte[0])
            os._exit(128 + byte[0])


def _end_process(number: int, frame: FrameType | None) -> None:
    """Before and after `Interrupt`, while modules are imported for example: there is nothing to save."""
    if not _STEPS_DONE.is_set():
        _report(number)
    os._exit(128 + number)


def _end_start(number: int, frame: FrameType | None) -> None:
    _report(number)
    raise Interrupted(number)


def _report(number: int) -> None:
    if not _REPORTED.is_set():
        _REPORTED.set()
        print(Interrupted(number), file=sys.stderr, flush=True)
