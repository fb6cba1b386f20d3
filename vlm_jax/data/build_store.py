"""Makes a token store, in parallel, once for all processes of a machine; an interrupted build is resumed."""

from __future__ import annotations

import concurrent.futures
import concurrent.futures.process
import contextlib
import hashlib
import json
import logging
import multiprocessing
import os
import pickle
import shutil
import time
import zlib
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from vlm_jax.config import DataConfig
from vlm_jax.data.example import Source
from vlm_jax.data.store import FIELDS, OFFSETS, TokenStore, content_of, dtype_of, locked
from vlm_jax.data.tokenise import Chunk, DatasetTokenizer
from vlm_jax.data.workers import sigint_blocked, start_worker
from vlm_jax.errors import DataError
from vlm_jax.files import JsonError, parse_json, read_regular
from vlm_jax.processing.processor import Processor
from vlm_jax.progress import Countdown

log = logging.getLogger(__name__)

VERSION = 3  # of the files
CHUNK = 512  # examples that are tokenised in one go
MOST_PROCESSES = 16  # each holds a tokenizer
MAX_CHUNKS_ALONE = 8  # chunks that are not worth starting processes for
SAVE_S = 5.0  # seconds of work that an interruption may cost
MAX_REPORTED = 5  # reasons of skipped examples that are reported


def token_store(config: DataConfig, processor: Processor, source: Source, *, skip: bool) -> TokenStore:
    """The store of a source, made if it is not there yet.

    Args:
      skip: leave out and report examples that are wrong or that no row can take, instead of raising.

    Raises:
      DataError: such an example; a cache folder that cannot be written.
    """
    parts = [VERSION, source.fingerprint, processor.fingerprint, config.tokens, config.images, config.frames]
    parts += [config.share_prefix, config.sampling, config.too_long, config.check_pictures, skip]
    parts += ["pairs"] if config.pairs else []
    parts += [value for value, default in ((config.leading_space, 0.0), (config.video_rate, 1.0)) if value != default]
    key = hashlib.sha256(json.dumps(parts, default=str).encode()).hexdigest()[:24]
    cache = Path(config.cache_dir).expanduser()
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with locked(cache / f"{key}.lock", "another process tokenises the data"):
            made = not (cache / key / "meta.json").is_file()
            if made:
                _StoreBuilder(cache / key, DatasetTokenizer(source, processor, config), skip=skip).run()
        store = TokenStore(cache / key) if made else _intact(cache / key)
    except OSError as error:
        where = error.filename or cache
        raise DataError(f"{where}: {error.strerror or error} (data.cache_dir={cache} is where the tokens are kept)") from error
    _report(store, made=made)
    if made and not config.check_pictures and store.file_bytes.any():
        log.info("pictures: their headers were read; --config.data.check_pictures=True decodes them all before the first step")
    if not len(store):
        reason = f"none of the {len(store.slots)} examples can be trained on; the first: {store.meta['shown'][0]}"
        raise DataError(reason if store.meta["problems"] else "the data set has no example to learn from")
    return store


def _intact(folder: Path) -> TokenStore:
    """
    Raises:
      DataError: it is not what was written.
    """
    with contextlib.suppress(JsonError, KeyError, TypeError, FileNotFoundError):
        meta = parse_json(read_regular(folder / "meta.json"))
        if meta.pop("checksum") == _checksum(meta) and meta["content"] == content_of(folder):
            return TokenStore(folder)
    raise DataError(f"{folder} is damaged: remove it, and the next start makes it anew")


def _checksum(meta: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(meta, sort_keys=True).encode())


def _report(store: TokenStore, *, made: bool) -> None:
    meta = store.meta
    if meta["problems"]:
        log.warning("%d of %d examples are left out; the first:", meta["problems"], len(store.slots))
        for reason in meta["shown"]:
            log.warning("  %s", reason)
        log.warning("  once they are mended, delete %s", store.folder)
    if meta["dropped"]:
        log.warning("%d turns are left out of conversations that are too long", meta["dropped"])
    if meta.get("cut"):
        log.warning("%d conversations are cut where a row ends", meta["cut"])
    if made:
        log.info(
            "%d conversations of %d examples, %.3g tokens in rows, tokenised in %.0f s; kept in %s",
            len(store), len(store.slots), float(np.sum(store.lengths, dtype=np.int64)), meta["seconds"], store.folder,
        )  # fmt: skip


class _StoreBuilder:
    def __init__(self, target: Path, dataset_tokenizer: DatasetTokenizer, *, skip: bool) -> None:
        self.target, self.dataset_tokenizer, self.skip = target, dataset_tokenizer, skip
        self.folder = target.with_name(f"{target.name}.part")
        self.ids = "uint16" if dataset_tokenizer.processor.tokenizer.vocab_size <= 1 << 16 else "int32"
        self.state: dict[str, Any] = {
            "next": 0,
            "problems": 0,
            "shown": [],
            "dropped": 0,
            "cut": 0,
            "seconds": 0.0,
            "bytes": {},
        }

    def run(self) -> None:
        total = len(self.dataset_tokenizer.source)
        self._resume()
        began = saved = time.perf_counter()
        before = self.state["seconds"]
        start = self.state["next"]
        countdown = Countdown(log.info, "tokenising: {} examples", total, done=start)
        ranges = [range(first, min(first + CHUNK, total)) for first in range(start, total, CHUNK)]
        with contextlib.ExitStack() as stack:
            files = {field: stack.enter_context((self.folder / f"{field}.bin").open("ab")) for field in FIELDS}
            for indices, chunk in stack.enter_context(contextlib.closing(self._chunks(ranges))):
                if chunk.problems and not self.skip:
                    raise DataError(chunk.problems[0])
                self._write(files, chunk)
                self.state["next"] = indices.stop
                now = time.perf_counter()
                self.state["seconds"] = before + now - began
                if now - saved > SAVE_S:
                    saved = now
                    self._save(files)
                countdown.at(indices.stop)
        self._finish()

    def _chunks(self, ranges: list[range]) -> Iterator[tuple[range, Chunk]]:
        """Chunks in their order."""
        count = min(len(os.sched_getaffinity(0)), len(ranges), MOST_PROCESSES)
        alone = len(ranges) <= MAX_CHUNKS_ALONE and not self.dataset_tokenizer.config.check_pictures
        if count < 2 or alone:
            for indices in ranges:
                yield indices, self.dataset_tokenizer.chunk(indices, skip=self.skip)
            return
        context = multiprocessing.get_context("spawn")
        # By way of a file: what is handed to a starting process through its pipe can wait for ever where it dies.
        pickled = self.target.with_name(f"{self.target.name}.pickle")
        pickled.write_bytes(pickle.dumps(self.dataset_tokenizer))
        pool = concurrent.futures.ProcessPoolExecutor(count, context, initializer=_start, initargs=(pickled,))
        waiting: deque[tuple[range, concurrent.futures.Future]] = deque()
        try:
            for indices in ranges:
                with sigint_blocked():
                    waiting.append((indices, pool.submit(_tokenise, indices, self.skip)))
                if len(waiting) > 2 * count:
                    yield self._next_result(waiting)
            while waiting:
                yield self._next_result(waiting)
        except concurrent.futures.process.BrokenProcessPool:
            raise DataError(
                "a process that tokenises the data was killed (out of memory?); run the same command again to resume"
            ) from None
        finally:
            # Whatever is still being tokenised is of no use any more.
            for process in list((pool._processes or {}).values()):
                process.kill()
            pool.shutdown(wait=False, cancel_futures=True)
            pickled.unlink(missing_ok=True)

    @staticmethod
    def _next_result(waiting: deque[tuple[range, concurrent.futures.Future]]) -> tuple[range, Chunk]:
        indices, future = waiting.popleft()
        while not concurrent.futures.wait([future], timeout=0.2).done:  # in short waits: a signal is heard between them
            pass
        return indices, future.result()

    def _write(self, files: dict[str, Any], chunk: Chunk) -> None:
        for field, values in chunk.fields.items():
            dtype = dtype_of(field, self.ids)
            joined = np.concatenate(values) if values and isinstance(values[0], np.ndarray) else np.asarray(values)
            files[field].write(joined.astype(dtype).tobytes())
        self.state["problems"] += len(chunk.problems)
        self.state["shown"] = (self.state["shown"] + chunk.problems)[:MAX_REPORTED]
        self.state["dropped"] += chunk.dropped
        self.state["cut"] = self.state.get("cut", 0) + chunk.cut

    def _save(self, files: dict[str, Any]) -> None:
        """Saves the position, so that a resumed build does not repeat what is on disk."""
        for file in files.values():
            file.flush()
        self.state["bytes"] = {field: file.tell() for field, file in files.items()}
        part = self.folder / "state.json.part"
        part.write_text(json.dumps(self.state))
        part.replace(self.folder / "state.json")

    def _resume(self) -> None:
        try:
            state = parse_json(read_regular(self.folder / "state.json"))
            for field, size in state["bytes"].items():
                with (self.folder / f"{field}.bin").open("r+b") as file:
                    file.truncate(size)
        except (JsonError, KeyError, TypeError, AttributeError, FileNotFoundError):  # none, or a damaged one
            shutil.rmtree(self.folder, ignore_errors=True)
            self.folder.mkdir(parents=True)
            return
        self.state = state
        log.info("tokenising: going on at example %d of %d", self.state["next"], len(self.dataset_tokenizer.source))

    def _finish(self) -> None:
        read = lambda field: np.fromfile(self.folder / f"{field}.bin", dtype_of(field, self.ids))
        for name, field in OFFSETS.items():
            np.save(self.folder / f"{name}.npy", np.concatenate([[0], np.cumsum(read(field), dtype=np.int64)]).astype(np.int64))
        meta = {name: self.state.get(name, 0) for name in ("problems", "shown", "dropped", "cut", "seconds")}
        meta |= {"ids": self.ids, "version": VERSION, "content": content_of(self.folder)}
        meta["pairs"] = self.dataset_tokenizer.config.pairs
        (self.folder / "meta.json").write_text(json.dumps(meta | {"checksum": _checksum(meta)}, indent=2) + "\n")
        shutil.rmtree(self.target, ignore_errors=True)
        self.folder.rename(self.target)
        (self.target / "state.json").unlink(missing_ok=True)


_DATASET_TOKENIZER: DatasetTokenizer | None = None


def _start(pickled: Path) -> None:
    """Runs first in a process that tokenises."""
    global _DATASET_TOKENIZER
    start_worker()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    _DATASET_TOKENIZER = pickle.loads(pickled.read_bytes())


def _tokenise(indices: range, skip: bool) -> Chunk:
    return _DATASET_TOKENIZER.chunk(indices, skip=skip)
