"""What every process does first that prepares data for a trainer."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading


def start_worker() -> None:
    # Ctrl-C is the trainer's to answer; a worker that died of it would be reported as a crash.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A trainer that was killed leaves no workers behind."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
