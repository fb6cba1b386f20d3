"""Renders chat templates in a process of their own, with a bound on time and memory; `template_worker.py` is that process.

One process serves all templates of this one, one after the other. A request costs about 25 us more than rendering here.
"""

from __future__ import annotations

import atexit
import contextlib
import itertools
import marshal
import math
import os
import select
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

HEADER = struct.Struct("<Q")  # a length, as `template_worker.py` writes it
SECONDS = 10  # for one text
START_SECONDS = 60  # for the process to be there, which takes 0.1 s on a machine with nothing else to do
MEMORY = 512 << 20  # bytes, of which Jinja and Python use none
LONGEST = 1 << 24  # characters of one text
PATIENCE = 2  # texts that may take too long before a template is given up
WORKER = Path(__file__).with_name("template_worker.py")


class TemplateFailure(Exception):
    """A template that gives no text; the message says why."""


class TemplateProcess:
    """The process, started when the first text is asked for, and again after one that had to be ended.

    It can be asked from any thread. A fork of this process starts one of its own.
    """

    def __init__(self) -> None:
        self._slow: dict[str, int] = {}
        self._reset()
        os.register_at_fork(after_in_child=self._forget)
        atexit.register(self._end)

    def render(self, template: str, variables: dict[str, Any]) -> str:
        """
        Args:
          variables: of text, numbers, truth values, None, and lists and dicts of them.

        Raises:
          TemplateFailure: the template refuses, is wrong, or takes too much time or memory.
        """
        with self._lock:
            if self._slow.get(template, 0) >= PATIENCE:
                raise TemplateFailure(f"it took more than {SECONDS} s {PATIENCE} times and is not rendered again")
            try:
                return self._asked(template, variables)
            except TimeoutError:
                self._slow[template] = self._slow.get(template, 0) + 1
                raise TemplateFailure(f"it takes more than {SECONDS} s; it may never end") from None
            except (EOFError, BrokenPipeError):
                raise TemplateFailure(f"it ends the process that renders it ({self._end(patience=1.0)})") from None

    def _asked(self, template: str, variables: dict[str, Any]) -> str:
        process = self._process or self._start()
        deadline = time.monotonic() + SECONDS
        new = template not in self._numbers
        number = self._numbers.setdefault(template, next(self._count))
        request = marshal.dumps((number, template if new else None, variables))
        try:
            _write(process.stdin.fileno(), HEADER.pack(len(request)) + request, deadline)
            head = _read(process.stdout.fileno(), 1 + HEADER.size, deadline)
            reply = _read(process.stdout.fileno(), HEADER.unpack(head[1:])[0], deadline)
        except (EOFError, BrokenPipeError):
            raise
        except BaseException:  # an interruption too: half a reply would be taken for the beginning of the next one
            self._end()
            raise
        text = reply.decode("utf-8", "surrogatepass")
        if head[:1] == b"=":
            return text
        if head[:1] == b"?":
            del self._numbers[template]
        raise TemplateFailure(text)

    def _start(self) -> subprocess.Popen:
        # The paths of this process: it may have found Jinja where another one would not look.
        paths = os.pathsep.join(path or os.getcwd() for path in sys.path)
        self._process = subprocess.Popen(
            [sys.executable, "-S", "-P", str(WORKER), str(MEMORY), str(math.ceil(SECONDS)), str(LONGEST)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            bufsize=0,
            env=os.environ | {"PYTHONPATH": paths},
            process_group=0,  # an interruption from the keyboard is this process's to answer
        )
        for stream in (self._process.stdin, self._process.stdout):
            os.set_blocking(stream.fileno(), False)
        try:
            _read(self._process.stdout.fileno(), 1, time.monotonic() + START_SECONDS)
        except (EOFError, TimeoutError):
            raise TemplateFailure(f"{sys.executable} cannot start {WORKER} ({self._end(patience=1.0)})") from None
        except BaseException:
            self._end()
            raise
        return self._process

    def _end(self, patience: float = 0.0) -> str:
        """Ends the process.

        Args:
          patience: seconds that it has to end by itself.

        Returns:
          how it ended.
        """
        if (process := self._process) is None:
            return ""
        process.stdin.close()
        process.stdout.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(patience)
        process.kill()
        process.wait()
        self._process, self._numbers = None, {}
        return f"signal {-process.returncode}" if process.returncode < 0 else f"exit status {process.returncode}"

    def _reset(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen | None = None
        self._numbers: dict[str, int] = {}
        self._count = itertools.count()

    def _forget(self) -> None:
        """In a fork: the process is the parent's, and ends when the parent closes the pipe."""
        if self._process is not None:
            self._process.stdin.close()
            self._process.stdout.close()
            self._process.returncode = 0
        self._reset()


def _wait(descriptor: int, event: int, deadline: float) -> None:
    poll = select.poll()
    poll.register(descriptor, event)
    if not poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
        raise TimeoutError


def _write(descriptor: int, content: bytes, deadline: float) -> None:
    view = memoryview(content)
    while view:
        try:
            view = view[os.write(descriptor, view) :]
        except BlockingIOError:
            _wait(descriptor, select.POLLOUT, deadline)


def _read(descriptor: int, size: int, deadline: float) -> bytes:
    parts, left = [], size
    while left:
        _wait(descriptor, select.POLLIN, deadline)
        if not (part := os.read(descriptor, left)):
            raise EOFError
        parts.append(part)
        left -= len(part)
    return b"".join(parts)


PROCESS = TemplateProcess()
