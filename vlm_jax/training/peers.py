"""The processes of one run: started together, and ended together where one of them dies or fails.

JAX ends the others as well, but after minutes and with the stacks of its C++; where a collective waits for ever, not at all. So
each process says every second, in the key-value store of JAX's coordinator, that it is alive, and looks when the others did.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import jax
from absl import logging as absl_logging

from vlm_jax.runtime import uncached_among_cpus

BEAT_S = 1.0  # between two signs of life
JAX_TIMEOUTS = 5  # times ours, so that JAX's own check comes later
KEY, LEFT, FAILED = "vlm_jax/alive", "left", "failed"
BROKEN = ("Gloo", "NCCL", "UNAVAILABLE", "DEADLINE_EXCEEDED", "UNKNOWN:", "ABORTED")  # in errors of a broken connection
ADVICE = "this one ends too; run the same command again on all machines to resume from the last checkpoint"


class Peers:
    """This process and the others of the run as one JAX system; it ends when another one dies or fails."""

    def __init__(
        self, coordinator: str | None, processes: int | None, index: int | None, *, timeout: int, log_file: Path
    ) -> None:
        """
        Args:
          coordinator: host:port of the first process; None, as the other two: found by JAX, on a TPU pod for example.
          timeout: seconds of silence after which a process is taken for dead.
          log_file: for what C++ writes to the standard error.
        """
        _catch_aborts(log_file)
        jax.distributed.initialize(
            coordinator_address=coordinator,
            num_processes=processes,
            process_id=index,
            heartbeat_timeout_seconds=JAX_TIMEOUTS * timeout,
        )
        uncached_among_cpus()
        # JAX has no public name for it; Orbax takes it from here as well.
        from jax._src.distributed import global_state

        self.client, self.timeout = global_state.client, timeout
        self.me = jax.process_index()
        self.seen = {index: ("", time.monotonic()) for index in range(jax.process_count()) if index != self.me}
        self.last = ""  # what this process said last, if it says no more
        for run in (self._beat, self._watch):
            threading.Thread(target=run, daemon=True).start()

    def explain(self, error: Exception) -> None:
        """Waits, if a collective failed: it fails at once where the connection to a dead process breaks, and `_watch` finds out
        which one that is, and ends this one."""
        if any(word in str(error) for word in BROKEN):
            time.sleep(self.timeout + 3 * BEAT_S)

    def leave(self, code: int, *, together: bool) -> None:
        """The end of this process, with this exit status.

        Args:
          together: whether the others come to their end as well; else they are told to, and nothing waits for them.
        """
        _SAID.set()
        self._say(LEFT if together else FAILED)
        if not together:
            time.sleep(3 * BEAT_S)  # so that they see it before the coordinator may be gone
            sys.stdout.flush()
            os._exit(code)

    def _say(self, word: str) -> None:
        self.last = word
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            self.client.key_value_set(f"{KEY}/{self.me}", word, allow_overwrite=True)

    def _beat(self) -> None:
        """Its calls fail or hang where the coordinator is gone; nothing is seen from then on."""
        count = 0
        while not self.last:
            count += 1
            with contextlib.suppress(jax.errors.JaxRuntimeError):
                self.client.key_value_set(f"{KEY}/{self.me}", str(count), allow_overwrite=True)
                for key, value in self.client.key_value_dir_get(KEY):
                    index = int(key.rpartition("/")[2])
                    if index != self.me and self.seen[index][0] != value:
                        self.seen[index] = (value, time.monotonic())
            time.sleep(BEAT_S)

    def _watch(self) -> None:
        while not self.last:
            for index, (said, at) in self.seen.items():
                if said == FAILED:
                    self._end(f"process {index} of {jax.process_count()} ended with an error, which it printed")
                if said != LEFT and time.monotonic() - at > self.timeout:
                    self._end(f"process {index} of {jax.process_count()} gave no sign of life for {self.timeout} s")
            time.sleep(BEAT_S)

    def _end(self, cause: str) -> None:
        """At once: whatever waits for the others would wait for ever."""
        _SAID.set()
        print(f"train.py: {cause}: {ADVICE}", file=sys.stderr, flush=True)
        os._exit(1)


def _catch_aborts(log_file: Path) -> None:
    """JAX's client aborts the process as soon as the coordinator is gone: its stacks go to a file, and a line is printed."""
    log_file.parent.mkdir(parents=True, exist_ok=True)
    terminal = os.dup(2)
    with log_file.open("a") as file:
        os.dup2(file.fileno(), 2)
    sys.stderr = os.fdopen(terminal, "w", buffering=1, errors="backslashreplace")
    absl_logging.get_absl_handler().python_handler.stream = sys.stderr

    def on_abort(number: int) -> None:
        if _SAID.is_set():
            os._exit(1)
        line = f"train.py: the first process, which coordinates the others, is gone, or JAX failed ({log_file}): {ADVICE}\n"
        os.write(terminal, line.encode())
        os._exit(1)

    # Python's own handlers run after the C handler returns, and then it is too late.
    _KEPT.append(ctypes.CFUNCTYPE(None, ctypes.c_int)(on_abort))
    ctypes.CDLL(None).signal(signal.SIGABRT, _KEPT[-1])


_SAID = threading.Event()  # why this process ends is printed already
_KEPT: list[Any] = []  # functions that C calls
