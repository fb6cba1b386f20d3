"""How the processes that prepare data for a trainer are started."""

from __future__ import annotations

import contextlib
import multiprocessing
import multiprocessing.resource_tracker
import os
import signal
import sys
import threading
from collections.abc import Iterator


def start_worker() -> None:
    # Signals to the whole process group are the trainer's to answer; a worker that died of one would be reported as a crash.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    # Where PyTorch is installed, transformers imports it: 200 MB that no picture processor of ours needs.
    sys.modules.setdefault("torch", None)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # it says so otherwise
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A trainer that was killed leaves no workers behind."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


@contextlib.contextmanager
def sigint_blocked() -> Iterator[None]:
    """Processes that are started within inherit a blocked SIGINT, for the time until they ignore it."""
    # It unblocks SIGINT in the thread that starts it, so it must run before.
    multiprocessing.resource_tracker.ensure_running()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
