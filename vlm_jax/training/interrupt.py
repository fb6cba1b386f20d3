"""Ctrl-C and SIGTERM as a wish that the loop asks for, between two steps."""

from __future__ import annotations

import signal
from types import FrameType

import jax
import numpy as np


class Interrupt:
    """`with Interrupt() as interrupt:` — the first signal is remembered, a second Ctrl-C interrupts at once."""

    def __init__(self) -> None:
        self.signal: int | None = None

    def __enter__(self) -> Interrupt:
        self.before = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = number

    def wanted(self, agree: bool) -> bool:
        """Whether to stop. Several processes stop at the same step: they are asked only where `agree` is true on all."""
        if jax.process_count() == 1:
            return self.signal is not None
        if not agree:
            return False
        from jax.experimental import multihost_utils

        signals = multihost_utils.process_allgather(np.asarray(self.signal or 0))
        self.signal = int(np.max(signals)) or None
        return self.signal is not None
