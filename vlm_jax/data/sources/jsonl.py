"""The user's own data: a JSON-lines file and image files. Its formats have different keys and may be mixed in a file.

A conversation in LLaVA's format. `image` (or `images`) is one path, a list of them, or missing; each `<image>` marks the place
of the next image, and without any marker all images come before the first turn. The turns of "gpt" are learned::

    {"id": "7", "image": "a.jpg", "conversations": [{"from": "human", "value": "<image>\\nWhat is this?"},
                                                    {"from": "gpt", "value": "A cat."}]}

The first turn may be from "system". A single marker in a human turn is moved before its text. A turn of gpt before the first
human one is left out, as LLaVA's own `preprocess` does.

An OpenAI-style list of messages (`processing/conversation.py`); the assistant's turns are learned::

    {"messages": [{"role": "user", "content": [{"type": "image", "image": "a.jpg"}, {"type": "text", "text": "What is this?"}]},
                  {"role": "assistant", "content": "A cat."}]}

Parts {"type": "image"} without a path take those of a list `images` beside `messages`, in their order.

Interleaved text and pictures, as in Flamingo's M3W. Text is learned unless "learn" is false; `frames` are one video::

    {"id": "8", "content": [{"image": "a.png"}, {"text": "My puppy."}, {"frames": ["f0.png", "f1.png"]},
                            {"text": "What does it do?", "learn": false}, {"text": " It sleeps."}]}

Pairs of a chosen and a rejected answer, for the objective "preference" (`data.pairs`), in three forms; of a conversation only
the last answer is learned. RLHF-V's, whose fields may also stand in a JSON string under "text"::

    {"image": "a.jpg", "question": "What is this?", "chosen": "A cat.", "rejected": "A dog."}

LLaVA-RLHF's, in which the outputs take the place of the conversation's last answer, if it has one there::

    {"image": "a.jpg", "conversations": [{"from": "human", "value": "<image>\\nWhat is this?"}], "preference": 1,
     "output_1": {"from": "llava", "value": "A cat."}, "output_2": {"from": "llava", "value": "A dog."}}

TRL's, a prompt and two answers as messages, or the prompt in front of each::

    {"images": ["a.jpg"], "prompt": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]}],
     "chosen": [{"role": "assistant", "content": "A cat."}], "rejected": [{"role": "assistant", "content": "A dog."}]}

Their pictures may also be {"bytes": base64, "path": ...}, as Hugging Face writes a data set to JSON.

OBELICS' and MMC4's documents are read as they are (`vlm_jax/data/documents.py`).

A video is a file under `video` (or `videos`), its place marked by `<video>` or `<image>`; in messages a part
{"type": "video", "video": "a.mp4"}; in interleaved content {"video": "a.mp4"}. At most `data.frames` frames are read of it,
`data.video_rate` a second (`processing/video.py`).

Paths are relative to `image_root`, or to the file's folder. A `.json` file with a list of such records also works. In an
interleaved text, `<image>` is plain text.
"""

from __future__ import annotations

import codecs
import functools
import hashlib
import json
import os
import re
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from vlm_jax.config import DataConfig, JsonLinesConfig
from vlm_jax.data.example import SOURCES, Example, Source, Split
from vlm_jax.data.jsonl_record import Record, Video
from vlm_jax.errors import DataError, ImageError, RecordError, RequestError, as_json
from vlm_jax.files import JsonError, open_regular, parse_json
from vlm_jax.processing.video import sampled_frames

BLOCK = 16 << 20  # bytes of a file that are read at once


class JsonLinesSource(Source):
    """One example per record. Only the offsets of the records are kept; records are read on demand."""

    def __init__(
        self, path: str | Path, image_root: str | Path, *, cache_dir: str | Path, video: Video = sampled_frames
    ) -> None:
        """Reads through the file once for its fingerprint, and for the record index if there is none yet.

        Args:
          image_root: where paths of pictures begin; "": the file's folder.
          cache_dir: folder for the record index.
          video: the frames that are read of a video's file.

        Raises:
          DataError: a missing or empty file, or a .json file that is not a list.
        """
        self._path, self._video = Path(path).expanduser(), video
        self._root = Path(image_root).expanduser() if image_root else self._path.parent
        try:
            with open_regular(self._path) as file:
                self._changed = os.fstat(file.fileno()).st_mtime_ns
                content = hashlib.file_digest(file, "sha256").hexdigest()
        except FileNotFoundError:
            raise DataError(f"{self._path}: there is no such file") from None
        except OSError as error:
            raise DataError(f"{self._path}: {error.strerror}") from error
        if not self._root.is_dir():
            raise DataError(f"data.source.image_root={str(self._root)!r}: there is no such folder")
        # The same file in another place has other pictures.
        self.fingerprint = f"{content} {self._path.absolute()} {self._root.absolute()}"
        self._index_file = Path(cache_dir).expanduser() / f"records-{content[:24]}{self._path.suffix}.npy"
        if not self._index_file.is_file():
            self._write_index()
        self._reset()

    def _write_index(self) -> None:
        """[records, 3] int64: line, first byte and bytes of each record."""
        records = _list_records if self._path.suffix == ".json" else _line_records
        table = np.asarray(list(records(self._path)), np.int64).reshape(-1, 3)
        if not len(table):
            raise DataError(f"{self._path}: holds no example")
        try:
            self._index_file.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=self._index_file.parent, delete=False) as part:
                np.save(part, table)
            Path(part.name).replace(self._index_file)
        except OSError as error:
            raise DataError(f"data.cache_dir={self._index_file.parent}: {error.strerror or error}; set another one") from error

    def _reset(self) -> None:
        self._lock = threading.Lock()
        self._file: Any = None
        self._index = np.load(self._index_file, mmap_mode="r")

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("_lock", "_file", "_index")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._reset()

    def __len__(self) -> int:
        return len(self._index)

    def __getitem__(self, index: int) -> Example:
        with self._lock:
            if self._file is None:
                try:
                    file = open_regular(self._path)
                except OSError as error:
                    raise DataError(f"{self._path}: {error.strerror}") from error
                if os.fstat(file.fileno()).st_mtime_ns != self._changed:
                    file.close()
                    raise DataError(f"{self._path}: was changed during the run; start again")
                self._file = file
        line, start, size = self._index[index].tolist()
        return self._parse(os.pread(self._file.fileno(), size, start), line)

    def _parse(self, raw: bytes, line: int) -> Example:
        where = f"{self._path}:{line}"
        try:
            return Record(where, parse_json(raw), self._picture, self._video).example()
        except (JsonError, RecordError, RequestError, ImageError) as error:
            raise DataError(f"{where}: {error}") from None

    def _picture(self, path: Any) -> str:
        if not isinstance(path, str) or not path:
            raise RecordError(f"a picture's path is {as_json(path)}; expected a string")
        root = os.path.normpath(self._root)
        whole = os.path.normpath(os.path.join(root, path))
        if os.path.commonpath([os.path.abspath(root), os.path.abspath(whole)]) != os.path.abspath(root):
            raise RecordError(f"picture {path!r} is outside of {root}; set data.source.image_root to a folder above it")
        return whole


def _line_records(path: Path) -> Iterator[tuple[int, int, int]]:
    """(line, first byte, bytes) of each line that is not blank."""
    start = 0
    with open_regular(path) as file:
        for line, raw in enumerate(file, 1):
            if raw.strip():
                yield line, start, len(raw)
            start += len(raw)


def _list_records(path: Path) -> Iterator[tuple[int, int, int]]:
    """(line, first byte, bytes) of each element of a JSON list, of which never more than a few blocks are in memory.

    Raises:
      DataError: it is not a list.
    """
    decoder, blank = json.JSONDecoder(), re.compile(r"[\s,\ufeff]*")
    blocks = _blocks(path)
    text, at, line, start = next(blocks, ""), 0, 1, 0  # what stands before `at` is counted in `line` and `start`

    def go_to(place: int) -> None:
        nonlocal at, line, start
        passed = text[at:place]
        at, line, start = place, line + passed.count("\n"), start + len(passed.encode())

    def longer() -> bool:
        nonlocal text, at
        if more := next(blocks, ""):
            text, at = text[at:] + more, 0
        return bool(more)

    go_to(blank.match(text).end())
    while at == len(text) and longer():
        go_to(blank.match(text).end())
    if text[at : at + 1] != "[":
        raise DataError(f"{path}:1: expected a list, '[...]'. If there is a record a line, name the file .jsonl")
    go_to(at + 1)
    while True:
        go_to(blank.match(text, at).end())
        try:
            if at == len(text):
                raise json.JSONDecodeError("the list is not closed", text, at)
            if text[at] == "]":
                return
            _, end = decoder.raw_decode(text, at)
        except json.JSONDecodeError as error:
            if longer():  # the record may go on
                continue
            raise DataError(f"{path}:{line + text.count(chr(10), at, error.pos)}: is not JSON: {error.msg}") from None
        except (RecursionError, ValueError):
            raise DataError(f"{path}:{line}: is nested too deeply, or has a number of thousands of digits") from None
        size = len(text[at:end].encode())
        yield line, start, size
        go_to(end)


def _blocks(path: Path) -> Iterator[str]:
    """The file's text in pieces, line ends as they are.

    Raises:
      DataError: it is not UTF-8.
    """
    decoder = codecs.getincrementaldecoder("utf-8")()
    with open_regular(path) as file:
        while True:
            raw = file.read(BLOCK)
            try:
                text = decoder.decode(raw, final=not raw)
            except UnicodeDecodeError as error:
                raise DataError(f"{path}: is not UTF-8: {error}") from None
            if text:
                yield text
            if not raw:
                return


@SOURCES.add(JsonLinesConfig)
def open_json_lines(config: DataConfig, split: Split) -> JsonLinesSource:
    """
    Raises:
      DataError: no file is named.
    """
    path = getattr(config.source, split)
    if not path:
        raise DataError(f"data.source.{split} is empty: set --config.data.source.{split} to a JSON-lines file")
    video = functools.partial(sampled_frames, rate=config.video_rate, most=config.frames)
    return JsonLinesSource(path, config.source.image_root, cache_dir=config.cache_dir, video=video)
