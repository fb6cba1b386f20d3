"""Batches for training and evaluation, in an order that one integer describes.

The rows of all epochs are one endless sequence; batch b holds rows b*B..(b+1)*B, B those of the global batch, and each process
makes its share of them. Any batch can be made without those before it. So the position of a run is the number of its step, the
global batches are the same for any number of processes, and worker processes change nothing but the speed.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Iterator
from typing import Any

import numpy as np
from absl import flags

from vlm_jax.batch import Batch
from vlm_jax.config import DataConfig, RunConfig
from vlm_jax.data.build_store import token_store
from vlm_jax.data.example import SOURCES, Source, Split
from vlm_jax.data.features import FeatureStore
from vlm_jax.data.packing import PackedRows, plan_epoch
from vlm_jax.data.rows import RowMaker, empty_rows
from vlm_jax.data.store import TokenStore
from vlm_jax.data.workers import sigint_blocked, start_worker
from vlm_jax.errors import DataError
from vlm_jax.processing.batching import Arrays
from vlm_jax.processing.processor import Processor

log = logging.getLogger(__name__)

LEFT_OUT = "left_out"  # beside the fields of a batch on its way from a worker: how many examples are, and their numbers
MAX_REPORTED = 5  # of them

_STORES: weakref.WeakKeyDictionary[Any, tuple[Any, TokenStore]] = weakref.WeakKeyDictionary()


def build_source(config: DataConfig, split: Split) -> Source:
    """The examples of "train" or "eval".

    Raises:
      DataError: the data cannot be read or is not right.
    """
    return SOURCES[type(config.source)](config, split)


def tokens_of(config: DataConfig, processor: Processor, source: Source) -> TokenStore:
    """The token store of a source: opened once, though a run evaluates many times; made if it is not there. Of a mixture, those
    of its members.

    Raises:
      DataError: an example that is wrong or fits in no row.
    """
    known, store = _STORES.get(source, (None, None))
    key = (config, processor.fingerprint)
    if store is None or known != key:
        if members := getattr(source, "members", {}):
            store = source.joined([tokens_of(config, processor, member) for member in members.values()])
        else:
            store = token_store(config, processor, source, skip=config.source.bad_lines == "skip")
        _STORES[source] = (key, store)
    source.check(len(store))
    return store


def check_same(store: TokenStore) -> None:
    """Checks that all processes of a run have the same data.

    Raises:
      DataError: they differ, because each process has its own files or cache.
    """
    import jax

    if jax.process_count() == 1:
        return
    from jax.experimental import multihost_utils

    found = multihost_utils.process_allgather(np.uint32(store.meta["content"]))
    if len(set(found.tolist())) > 1:
        raise DataError(
            f"the processes have different data (checksums {found.tolist()}): bring the same files to every machine, and "
            f"delete {store.folder} where they differed"
        )


class _LeftOut:
    """Examples that are left out because a picture of theirs cannot be used (bad_lines="skip")."""

    def __init__(self, maker: RowMaker) -> None:
        self._maker, self.examples = maker, set()

    def add(self, example: int) -> None:
        """Reports the first ones."""
        if example not in self.examples and len(self.examples) < MAX_REPORTED:
            log.warning("left out: %s", self._maker.why(example))
        self.examples.add(example)


def _share(config: DataConfig, *, process_index: int, process_count: int) -> range:
    """The rows of a global batch that a process makes."""
    if config.rows % process_count:
        raise DataError(f"data.rows={config.rows} does not divide among {process_count} processes")
    size = config.rows // process_count
    return range(process_index * size, (process_index + 1) * size)


class _LocalBatch:
    """Number of a step -> its rows of this process, as arrays, and the examples that are left out. It pickles."""

    def __init__(
        self, config: DataConfig, rows: PackedRows, maker: RowMaker, share: range, features: FeatureStore | None
    ) -> None:
        self._config, self._rows, self._maker, self._share = config, rows, maker, share
        self._shape = None if features is None else features.shape

    def __call__(self, step: int) -> Arrays:
        arrays, left_out = empty_rows(self._config, len(self._share), features=self._shape), []
        for place, offset in enumerate(self._share):
            number = int(step) * self._config.rows + offset
            left_out += self._maker.fill(arrays, place, self._rows[number], number)
        return arrays | {LEFT_OUT: np.asarray([len(left_out), *left_out])}


def _start_worker(index: int, count: int) -> None:
    """Runs first in a worker process."""
    start_worker()
    import jax  # Grain has imported it already

    jax.config.update("jax_platforms", "cpu")  # whatever a worker may call, it must not take the accelerator


def _close(held: list[Any]) -> None:
    while held:
        held.pop().close()


class TrainBatches:
    """The training batches of this process from step `start` on; iterate over it once, then `close` it.

    Attributes:
      position: the step whose batch comes next. It is all a checkpoint has to keep.
    """

    def __init__(
        self,
        config: RunConfig,
        processor: Processor,
        source: Source,
        *,
        start: int = 0,
        process_index: int = 0,
        process_count: int = 1,
        features: FeatureStore | None = None,
    ) -> None:
        """Opens or makes the token store, and starts `config.data.workers` processes.

        Args:
          features: what the batches hold in the place of pixels; None: pixels.

        Raises:
          DataError: an example that fits in no row, or rows that do not divide among the processes.
        """
        import grain

        data = config.data
        store = tokens_of(data, processor, source)
        rows = PackedRows(store, tokens=data.tokens, images=data.images, per_image=data.sequences_per_image, seed=config.seed)
        rows.locate(start * data.rows)  # planned here, where it can be interrupted, not by every worker
        share = _share(data, process_index=process_index, process_count=process_count)
        self.position = start
        maker = RowMaker(data, store, source, processor.spread, config.seed, features=features)
        self._left_out = _LeftOut(maker)
        made = grain.MapDataset.range(start, max(start, config.steps)).map(_LocalBatch(data, rows, maker, share, features))
        # One thread: NumPy's small operations hold the interpreter, more threads only take turns.
        ahead = made.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=4))
        if data.workers:
            if not flags.FLAGS.is_parsed():  # Grain reads its own; a library's user need not have called `app.run`
                flags.FLAGS.mark_as_parsed()
            options = grain.MultiprocessingOptions(num_workers=data.workers, per_worker_buffer_size=4)
            ahead = ahead.mp_prefetch(options, worker_init_fn=_start_worker)
        self._held = [iter(ahead)]  # empty once closed
        self._close = weakref.finalize(self, _close, self._held)  # at the latest when the interpreter ends
        self._started = False

    def __iter__(self) -> Iterator[Batch]:
        return self

    @property
    def left_out(self) -> int:
        """Number of this process's examples so far that are left out because a picture cannot be used (bad_lines="skip")."""
        return len(self._left_out.examples)

    def __next__(self) -> Batch:
        """The batch of step `position`: images [B / processes, M, I, height, width, 3], the rest as documented in `Batch`.

        Raises:
          DataError: a picture cannot be read; it names the example.
        """
        if not self._held:
            raise StopIteration
        arrays = next(self._held[0]) if self._started else self._first()
        self.position += 1
        for example in arrays.pop(LEFT_OUT)[1:].tolist():
            self._left_out.add(example)
        batch = Batch(**arrays)
        arrays.clear()  # Grain keeps the last dict to the very end; arrays shared with a worker would then stay unfreed
        return batch

    def _first(self) -> Arrays:
        """The workers are started by the first call."""
        self._started = True
        with sigint_blocked():
            return next(self._held[0])

    def close(self) -> None:
        """Ends the worker processes."""
        self._close()

    def __enter__(self) -> TrainBatches:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()


def eval_batches(
    config: DataConfig,
    processor: Processor,
    source: Source,
    *,
    process_index: int = 0,
    process_count: int = 1,
    max_rows: int = 0,
    features: FeatureStore | None = None,
) -> Iterator[Batch]:
    """Every sequence of the source once, in its order, without augmentation.

    The last batch is filled up with empty rows, so that all processes get equally many batches of equal shape.

    Args:
      max_rows: only so many rows from the beginning; 0: all.
      features: as in TrainBatches.

    Raises:
      DataError: as for TrainBatches.
    """
    store = tokens_of(config, processor, source)
    share = _share(config, process_index=process_index, process_count=process_count)
    plan = plan_epoch(store.lengths_to_pack, config.tokens, config.images, per_image=config.sequences_per_image, shuffle=False)
    count = min(len(plan), max_rows) if max_rows else len(plan)
    maker = RowMaker(config, store, source, processor.spread, seed=None, features=features)
    left_out = _LeftOut(maker)
    for first in range(0, count, config.rows):
        arrays = empty_rows(config, len(share), features=None if features is None else features.shape)
        for place, offset in enumerate(share):
            if first + offset < count:
                for example in maker.fill(arrays, place, plan[first + offset], first + offset):
                    left_out.add(example)
        yield Batch(**arrays)
    if left_out.examples:
        log.warning("%d examples of the evaluation are left out", len(left_out.examples))
