"""Files of users: opened only if they are regular ones, JSON of any bytes, checksums, locks."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import logging
import os
import stat
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any, BinaryIO

log = logging.getLogger(__name__)

CHECKSUMS = "checksums.sha256"  # in the format of `sha256sum`: `sha256sum -c checksums.sha256` checks a folder too


HEADER = "# written by vlm_jax\n"  # a comment for `sha256sum`


class NotRegular(OSError):
    """A FIFO, a socket or a device, from which reading could wait for ever or never end."""

    def __init__(self, path: str | Path) -> None:
        super().__init__(None, "is not a regular file (but a FIFO, a socket or a device)", str(path))


class JsonError(ValueError):
    """Bytes that are not JSON; the caller adds the name of the file."""


class ChecksumError(ValueError):
    """A file that is not what was written."""


def open_regular(path: str | Path) -> BinaryIO:
    """Opens a file for reading, in binary.

    Raises:
      NotRegular: a FIFO, a socket or a device; IsADirectoryError and the other kinds of OSError as `open`.
    """
    # Opening a FIFO without a writer would wait for one.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        if not stat.S_ISREG(mode := os.fstat(descriptor).st_mode) and not stat.S_ISDIR(mode):
            raise NotRegular(path)
        return os.fdopen(descriptor, "rb")  # refuses a directory
    except BaseException:
        with contextlib.suppress(OSError):
            os.close(descriptor)
        raise


def read_regular(path: str | Path) -> bytes:
    """The bytes of a file; raises as `open_regular`."""
    with open_regular(path) as file:
        return file.read()


def parse_json(raw: bytes | str) -> Any:
    """
    Raises:
      JsonError: not UTF-8, not JSON, nested too deeply, or a number of thousands of digits.
    """
    try:
        return json.loads(raw)
    except UnicodeDecodeError as error:
        raise JsonError(f"is not UTF-8 ({error.reason} at byte {error.start})") from None
    except json.JSONDecodeError as error:
        line = f"line {error.lineno}, " if error.lineno > 1 else ""
        raise JsonError(f"is not JSON: {error.msg} at {line}column {error.colno}") from None
    except RecursionError:
        raise JsonError("is nested too deeply") from None
    except ValueError:  # of int()
        raise JsonError(f"has a number of more than {sys.get_int_max_str_digits():,} digits") from None


def sha256(path: str | Path) -> str:
    """Of a regular file, in hex; raises as `open_regular`."""
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_checksums(folder: Path, names: list[str] | None = None) -> None:
    """Writes `checksums.sha256` into a folder.

    Args:
      names: of files, relative to the folder; None: all that it holds.
    """
    found = names if names is not None else [p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()]
    lines = [f"{sha256(folder / name)}  {name}\n" for name in sorted(found) if name != CHECKSUMS]
    part = folder / f"{CHECKSUMS}.part"
    part.write_text(HEADER + "".join(lines))
    part.replace(folder / CHECKSUMS)


def check_checksums(folder: Path, *, advice: str, only: Callable[[str], bool] = lambda name: True) -> None:
    """Compares the files of a folder with its `checksums.sha256`, if it has one; others may be added.

    Args:
      advice: what to do where they differ.
      only: which names are compared.

    Raises:
      ChecksumError: a file is missing or was changed.
    """
    try:
        raw = read_regular(folder / CHECKSUMS)
    except (FileNotFoundError, NotADirectoryError):
        return
    header, _, rest = raw.decode(errors="replace").partition("\n")
    if header != HEADER.strip():
        return  # somebody else's
    wanted: dict[str, str] = {}
    for line in rest.splitlines():
        digest, _, name = line.partition("  ")
        inside = name and not Path(name).is_absolute() and ".." not in Path(name).parts
        if len(digest) != 64 or not inside:
            raise ChecksumError(f"{folder / CHECKSUMS} is damaged: {line[:80]!r} is not a checksum and a name. {advice}")
        if only(name):
            wanted[name] = digest

    def wrong(name: str) -> str | None:
        try:
            return None if sha256(folder / name) == wanted[name] else "is not the file that was written"
        except OSError as error:
            return f"{error.strerror or error}"

    with ThreadPoolExecutor(max_workers=8) as pool:
        for name, cause in zip(wanted, pool.map(wrong, wanted), strict=True):
            if cause:
                raise ChecksumError(f"{folder / name}: {cause} ({CHECKSUMS} says so). {advice}")


def lock(file: IO[Any], busy: str) -> None:
    """A lock on an open file that no other process of the machine can take; it goes with the process, however that ends.

    Args:
      busy: the message where another process holds it.

    Raises:
      BlockingIOError: another process holds it.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise BlockingIOError(error.errno, busy) from None
    except OSError as error:
        if error.errno not in (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK):
            raise
        log.warning("%s: its file system has no locks: nothing keeps another process from writing it", file.name)
