"""Tar shards in webdataset's layout: the files of a sample follow one another, named by its key and what each is.

    00000.tar:  000000000.jpg  000000000.txt  000000000.json  000000001.jpg ...

A sample is its pictures (.jpg, .jpeg, .png, .webp, .gif, .bmp) with one of

* KEY.json with a record of `jsonl.py` (a conversation, messages, interleaved content) or of `documents.py`, which names its
  pictures by their files' names, or not at all where all come first;
* KEY.txt: the caption, where such a KEY.json is not there;
* KEY.json with a caption under "caption" or "text", as img2dataset writes it.

Nothing is unpacked: where each file stands is looked up once and kept in `data.cache_dir`.
"""

from __future__ import annotations

import collections
import glob
import hashlib
import os
import re
import tarfile
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from vlm_jax.config import DataConfig
from vlm_jax.config.sources import TarConfig
from vlm_jax.data.documents import as_content
from vlm_jax.data.example import SOURCES, Example, Source, Split
from vlm_jax.data.jsonl_record import KINDS, Record
from vlm_jax.errors import DataError, RecordError, RequestError, as_json
from vlm_jax.files import JsonError, open_regular, parse_json
from vlm_jax.processing.conversation import Medium, assistant, user

PICTURES = ("jpg", "jpeg", "png", "webp", "gif", "bmp")
OPEN_SHARDS = 64  # that a process holds open
VERSION = 1  # of the index


class TarSource(Source):
    """One example a sample. It pickles as the shards' names: every process reads the index from the cache."""

    def __init__(self, shards: list[Path], *, cache_dir: str | Path) -> None:
        """
        Raises:
          DataError: a shard that cannot be read, or shards without a sample.
        """
        self._shards = shards
        try:
            self._stats = [(shard.stat().st_size, shard.stat().st_mtime_ns) for shard in shards]
        except OSError as error:
            raise DataError(f"{error.filename}: {error.strerror}") from error
        known = repr((VERSION, list(zip(map(str, shards), self._stats, strict=True))))
        self.fingerprint = f"tar {hashlib.sha256(known.encode()).hexdigest()}"
        self._index_file = Path(cache_dir).expanduser() / f"{self.fingerprint.replace(' ', '-')[:28]}.npz"
        if not self._index_file.is_file():
            self._write_index()
        self._reset()

    def _write_index(self) -> None:
        keys: list[str] = []
        suffixes: dict[str, int] = {}
        starts, files = [], []  # of samples; [files, 4]: shard, first byte, bytes, suffix
        for number, shard in enumerate(self._shards):
            before = None
            for name, start, size in _files_of(shard):
                key, suffix = _key_of(name)
                if key != before:
                    starts.append(len(files))
                    keys.append(key)
                before = key
                files.append((number, start, size, suffixes.setdefault(suffix, len(suffixes))))
        if not keys:
            raise DataError(f"{self._shards[0]}: holds no file; expected KEY.jpg with KEY.txt or KEY.json")
        arrays = {
            "files": np.asarray(files, np.int64),
            "starts": np.asarray([*starts, len(files)], np.int64),
            "keys": np.asarray([key.encode() for key in keys]),
            "suffixes": np.asarray([suffix.encode() for suffix in suffixes]),
        }
        try:
            self._index_file.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=self._index_file.parent, delete=False) as part:
                np.savez(part, **arrays)
            Path(part.name).replace(self._index_file)
        except OSError as error:
            raise DataError(f"data.cache_dir={self._index_file.parent}: {error.strerror or error}; set another one") from error

    def _reset(self) -> None:
        self._lock = threading.Lock()
        self._open: collections.OrderedDict[int, Any] = collections.OrderedDict()
        with np.load(self._index_file) as index:
            self._files, self._starts, self._keys = index["files"], index["starts"], index["keys"]
            self._suffixes = [suffix.decode() for suffix in index["suffixes"].tolist()]

    def __getstate__(self) -> dict[str, Any]:
        kept = ("_shards", "_stats", "fingerprint", "_index_file")
        return {name: self.__dict__[name] for name in kept}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._reset()

    def __len__(self) -> int:
        return len(self._keys)

    def check(self, conversations: int) -> None:
        """Any number is right."""

    def __getitem__(self, index: int) -> Example:
        key = self._keys[index].decode()
        here = self._files[self._starts[index] : self._starts[index + 1]].tolist()
        where = f"{self._shards[here[0][0]]}:{key}"
        found = {self._suffixes[suffix]: (shard, start, size) for shard, start, size, suffix in here}
        try:
            return _Sample(where, key, found, self._read).example()
        except (JsonError, RecordError, RequestError, UnicodeDecodeError) as error:
            raise DataError(f"{where}: {error}") from None

    def _read(self, shard: int, start: int, size: int) -> bytes:
        with self._lock:
            file = self._open.get(shard)
            if file is None:
                file = self._open[shard] = self._opened(shard)
                if len(self._open) > OPEN_SHARDS:
                    self._open.popitem(last=False)[1].close()
            self._open.move_to_end(shard)
            raw = os.pread(file.fileno(), size, start)
        if len(raw) != size:
            raise DataError(f"{self._shards[shard]}: is cut short; bring the whole file")
        return raw

    def _opened(self, shard: int) -> Any:
        path = self._shards[shard]
        try:
            file = open_regular(path)
        except OSError as error:
            raise DataError(f"{path}: {error.strerror}") from error
        now = os.fstat(file.fileno())
        if (now.st_size, now.st_mtime_ns) != self._stats[shard]:
            file.close()
            raise DataError(f"{path}: was changed during the run; start again")
        return file


class _Sample:
    """The files of a key on their way to an Example."""

    def __init__(self, where: str, key: str, files: dict[str, tuple[int, int, int]], read: Any) -> None:
        self._where, self._key, self._files, self._read = where, key, files, read
        self._pictures = [suffix for suffix in files if suffix.rpartition(".")[2].lower() in PICTURES]

    def _bytes(self, suffix: str) -> bytes:
        return self._read(*self._files[suffix])

    def example(self) -> Example:
        """
        Raises:
          RecordError, JsonError, RequestError, UnicodeDecodeError: a text that is missing or wrong.
        """
        record = parse_json(self._bytes("json")) if "json" in self._files else {}
        if not isinstance(record, dict):
            raise RecordError(f"its .json is {as_json(record)}; expected an object")
        content = as_content(record)
        if any(kind in content for kind in KINDS):
            if "conversations" in content and not content.keys() & {"image", "images"}:
                content = content | {"images": self._pictures}
            return Record(self._where, content, self._picture).example()
        caption = self._caption(record)
        media = tuple((self._bytes(suffix),) for suffix in self._pictures)
        if not media:
            raise RecordError(f"has a caption and no picture; it has {', '.join(sorted(self._files))}")
        turns = (user(*(Medium(number) for number in range(len(media)))), assistant(caption))
        return Example(self._where, media, (turns,))

    def _caption(self, record: dict[str, Any]) -> str:
        if "txt" in self._files:
            caption: Any = self._bytes("txt").decode()
        else:
            caption = next((record[key] for key in ("caption", "text") if key in record), None)
        if not isinstance(caption, str) or not caption.strip():
            raise RecordError(
                f"has no text: expected {self._key}.txt, or .json with a record or a 'caption'; it has "
                f"{', '.join(sorted(self._files))}"
            )
        return caption.strip()

    def _picture(self, name: Any) -> bytes:
        """By its suffix ("jpg", "0.png"), its file's name, or, of the only picture, its ending."""
        if not isinstance(name, str):
            raise RecordError(f"a picture's name is {as_json(name)}; expected a string")
        last = name.rpartition("/")[2]
        for suffix in self._pictures:
            if suffix in (name, last) or f"{self._key.rpartition('/')[2]}.{suffix}" == last:
                return self._bytes(suffix)
        if len(self._pictures) == 1 and last.rpartition(".")[2].lower() in PICTURES:
            return self._bytes(self._pictures[0])
        raise RecordError(f"names the picture {name!r}; it has {', '.join(sorted(self._pictures)) or 'none'}")


def _files_of(shard: Path) -> Iterator[tuple[str, int, int]]:
    """(name, first byte, bytes) of each file.

    Raises:
      DataError: it is no uncompressed tar file, or is damaged.
    """
    try:
        with tarfile.open(shard, "r:") as tar:
            while (member := tar.next()) is not None:
                tar.members = []  # it would keep them all
                if member.isreg():
                    yield member.name, member.offset_data, member.size
    except (tarfile.TarError, OSError, EOFError) as error:
        advice = "gunzip it first: files are read at their places" if shard.suffix in (".gz", ".tgz", ".bz2", ".xz") else ""
        raise DataError(f"{shard}: is no tar file that can be read: {error}" + (f"; {advice}" if advice else "")) from error


def _key_of(name: str) -> tuple[str, str]:
    """ "a/b.c/7.seg.jpg" -> "a/b.c/7" and "seg.jpg"."""
    folder, _, file = name.rpartition("/")
    key, _, suffix = file.partition(".")
    return (f"{folder}/{key}" if folder else key), suffix


def shards_of(pattern: str) -> list[Path]:
    """The files of "shards/*.tar" or "shards/{000..199}.tar", in their order.

    Raises:
      DataError: there is none.
    """
    expanded = os.path.expanduser(pattern)
    braces = re.search(r"\{(\d+)\.\.(\d+)\}", expanded)
    if braces:
        first, last = braces.groups()
        numbers = range(int(first), int(last) + 1)
        names = [f"{expanded[: braces.start()]}{number:0{len(first)}}{expanded[braces.end() :]}" for number in numbers]
    else:
        names = [expanded] if os.path.exists(expanded) else sorted(glob.glob(expanded))
    if not names:
        raise DataError(f"{pattern}: there is no such file; expected a tar file, or several as shards/*.tar")
    return [Path(name) for name in names]


@SOURCES.add(TarConfig)
def open_tar(config: DataConfig, split: Split) -> TarSource:
    """
    Raises:
      DataError: no shard is named, or one cannot be read.
    """
    pattern = getattr(config.source, split)
    if not pattern:
        raise DataError(f"data.source.{split} is empty: set --config.data.source.{split} to tar files, as shards/*.tar")
    return TarSource(shards_of(pattern), cache_dir=config.cache_dir)
