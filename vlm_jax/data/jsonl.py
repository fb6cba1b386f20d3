"""The user's own data: a JSON-lines file beside pictures. Two formats, told apart by their keys, may be mixed in a file.

A conversation, as LLaVA's data is published. `image` may be left out, be one path, or several; each `<image>` stands for
the next of them, and without any marker they stand before the first turn. What "gpt" says is learned::

    {"id": "7", "image": "a.jpg", "conversations": [{"from": "human", "value": "<image>\\nWhat is this?"},
                                                    {"from": "gpt", "value": "A cat."}]}

A human turn is written with `data.prompt`, and a gpt turn with `data.answer`. Where a turn begins with markers, or has one
only, they stand before the prompt; others stay where they are in the question.

Interleaved text and pictures, as in Flamingo's M3W. Text is learned unless it says otherwise; `frames` are one video::

    {"id": "8", "content": [{"image": "a.png"}, {"text": "My puppy."}, {"frames": ["f0.png", "f1.png"]},
                            {"text": "What does it do?", "learn": false}, {"text": " It sleeps."}]}

Paths are below `image_root`, or beside the file. A `.json` file that holds a list of such records will do as well.
`<image>` written in an interleaved text is text.
"""

from __future__ import annotations

import json
import logging
import os
import re
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from vlm_jax.data.example import DataError, Example
from vlm_jax.data.images import ImageError, check_image
from vlm_jax.data.jsonl_record import Bad, Record, shown

log = logging.getLogger(__name__)

REPORT_S = 10.0  # seconds between progress lines
SHOWN = 5  # reasons of skipped lines that are reported


class JsonLinesSource:
    """One example a line. Every line is checked once at the start; only where each begins is kept.

    Attributes:
      skipped: number of lines left out.
    """

    def __init__(self, path: str | Path, image_root: str | Path, prompt: str, answer: str, bad_lines: str = "error"):
        """Reads through the file, and looks at the header of every picture.

        Args:
          image_root: where paths of pictures begin; "": the file's folder.
          prompt, answer: templates of `{question}` and `{answer}`, as in DataConfig.
          bad_lines: "error", or "skip": leave out, count and report.

        Raises:
          DataError: the file is not there or holds no example; or, unless skipped, a line is wrong. It names file and line.
        """
        self._path = Path(path).expanduser()
        self._root = Path(image_root).expanduser() if image_root else self._path.parent
        self._prompt, self._answer = prompt, answer
        if not self._path.is_file():
            raise DataError(f"{self._path}: there is no such file")
        if not self._root.is_dir():
            raise DataError(f"data.source.image_root={str(self._root)!r}: there is no such folder")
        records = _list_records if self._path.suffix == ".json" else _line_records
        self._starts, self._sizes, self._lines, self.skipped = self._check(records(self._path), bad_lines == "skip")
        self._changed = self._path.stat().st_mtime_ns
        self._reset()

    def _check(self, records: Iterator[tuple[int, int, bytes]], skip: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
        """(line, start, bytes) of each record -> starts [N], sizes [N], lines [N] of the good ones, number of bad ones."""
        kept: list[tuple[int, int, int]] = []
        reasons: list[str] = []
        skipped = 0
        began = reported = time.perf_counter()
        for line, start, raw in records:
            try:
                example = self._parse(raw, line)
                for picture in (frame for slot in example.images for frame in slot):
                    try:
                        check_image(picture)
                    except ImageError as error:
                        raise DataError(f"{self._path}:{line}: {error}") from None
                kept.append((start, len(raw), line))
            except DataError as error:
                if not skip:
                    raise
                skipped += 1
                if len(reasons) < SHOWN:
                    reasons.append(str(error))
            if time.perf_counter() - reported > REPORT_S:
                reported = time.perf_counter()
                log.info("%s: checked %d lines, %.0f s", self._path, len(kept) + skipped, reported - began)
        if skipped:
            log.warning("%s: %d of %d lines skipped; the first:", self._path, skipped, skipped + len(kept))
            for reason in reasons:
                log.warning("  %s", reason)
        if not kept:
            raise DataError(f"{self._path}: holds no example" + (f"; all {skipped} lines are bad" if skipped else ""))
        table = np.asarray(kept, np.int64)
        return table[:, 0].copy(), table[:, 1].astype(np.int32), table[:, 2].astype(np.int32), skipped

    def _reset(self) -> None:
        self._lock = threading.Lock()
        self._file: Any = None

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("_lock", "_file")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._reset()

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, index: int) -> Example:
        with self._lock:
            if self._file is None:
                self._file = self._path.open("rb")
                if os.fstat(self._file.fileno()).st_mtime_ns != self._changed:
                    raise DataError(f"{self._path}: was changed during the run; start again")
        raw = os.pread(self._file.fileno(), int(self._sizes[index]), int(self._starts[index]))
        return self._parse(raw, int(self._lines[index]))

    def _parse(self, raw: bytes, line: int) -> Example:
        where = f"{self._path}:{line}"
        try:
            record = json.loads(raw)
        except UnicodeDecodeError as error:
            raise DataError(f"{where}: is not UTF-8: {error}") from None
        except json.JSONDecodeError as error:
            raise DataError(f"{where}: is not JSON: {error.msg} at column {error.colno}") from None
        except (ValueError, RecursionError) as error:
            raise DataError(f"{where}: is not JSON: {error}") from None
        try:
            return Record(where, record, self._picture).example(self._prompt, self._answer)
        except Bad as error:
            raise DataError(f"{where}: {error}") from None

    def _picture(self, path: Any) -> str:
        if not isinstance(path, str) or not path:
            raise Bad(f"a picture's path is {shown(path)}; expected a string")
        root = os.path.normpath(self._root)
        whole = os.path.normpath(os.path.join(root, path))
        if os.path.commonpath([os.path.abspath(root), os.path.abspath(whole)]) != os.path.abspath(root):
            raise Bad(f"picture {path!r} is outside of {root}; set data.source.image_root to a folder above it")
        return whole


def _line_records(path: Path) -> Iterator[tuple[int, int, bytes]]:
    """(line, start, bytes) of each line that is not blank."""
    start = 0
    with path.open("rb") as file:
        for line, raw in enumerate(file, 1):
            if raw.strip():
                yield line, start, raw
            start += len(raw)


def _list_records(path: Path) -> Iterator[tuple[int, int, bytes]]:
    """(line, start, bytes) of each element of a JSON list, read whole once.

    Raises:
      DataError: it is not a list.
    """
    try:
        text = path.read_bytes().decode()  # not `read_text`: it changes line ends, and with them where a record begins
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: is not UTF-8: {error}") from None
    decoder, blank = json.JSONDecoder(), re.compile(r"[\s,\ufeff]*")
    at = blank.match(text).end()
    if text[at : at + 1] != "[":
        raise DataError(f"{path}:1: expected a list, '[...]'. If there is a record a line, name the file .jsonl")
    at += 1
    line, start = 1 + text.count("\n", 0, at), len(text[:at].encode())
    while True:
        begin = blank.match(text, at).end()
        line, start = line + text.count("\n", at, begin), start + len(text[at:begin].encode())
        if text[begin : begin + 1] == "]":
            return
        try:
            _, at = decoder.raw_decode(text, begin)
        except json.JSONDecodeError as error:
            raise DataError(f"{path}:{line + text.count(chr(10), begin, error.pos)}: is not JSON: {error.msg}") from None
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path}:{line}: is not JSON: {error}") from None
        raw = text[begin:at].encode()
        yield line, start, raw
        line, start = line + text.count("\n", begin, at), start + len(raw)
