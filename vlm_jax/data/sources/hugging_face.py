"""A set of Hugging Face `datasets`: a hub name, or a folder of parquet files (`pip install 'vlm_jax[datasets]'`).

    --config.data.source.name=HuggingFaceM4/VQAv2 --config.data.source.fields.question=question \\
        --config.data.source.fields.answer=multiple_choice_answer

It is fetched whole, as `load_dataset` keeps it, and mapped into memory. Of a set that is too large for that,

    --config.data.source.stream=100000

reads the first 100,000 rows of each split as a stream and keeps them: a run names every row by a number, so that a resumed one
goes on with the same, and a stream has no numbers. Only what these rows need is fetched, once.

In a folder, `train-*.parquet` or `train/*.parquet` are the files of a split.
"""

from __future__ import annotations

import functools
import hashlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vlm_jax.config import DataConfig
from vlm_jax.config.sources import FieldsConfig, HuggingFaceConfig
from vlm_jax.data.example import SOURCES, Example, Source, Split
from vlm_jax.data.fields import check_fields, example_of
from vlm_jax.errors import DataError, RecordError, RequestError, first_line
from vlm_jax.progress import Countdown

log = logging.getLogger(__name__)


class HuggingFaceSource(Source):
    """One example a row; a worker process opens the set anew."""

    def __init__(self, name: str, configuration: str, split: str, *, fields: FieldsConfig, stream: int = 0) -> None:
        """
        Args:
          stream: so many rows are read as a stream and kept; 0: the split is fetched whole.

        Raises:
          DataError: it cannot be had, or `datasets` is not installed.
        """
        self._name, self._configuration, self._split = name, configuration, split
        self._fields, self._stream = fields, stream
        self._rows, fingerprint = self._open()
        self._count = len(self._rows)
        self.fingerprint = f"hugging_face {name} {configuration} {split} {fields} {fingerprint}"

    def _open(self) -> tuple[Any, str]:
        try:
            import datasets
        except ImportError as error:
            raise DataError(f"data.source.kind=hugging_face needs {error.name}: pip install 'vlm_jax[datasets]'") from error
        datasets.disable_progress_bars()
        folder = Path(self._name).expanduser()
        split = self._split
        if self._stream and "[" in split:
            raise DataError(f"data.source.stream={self._stream} reads the first rows of a whole split, and {split!r} is a part")
        try:
            if folder.is_dir():
                name, bracket, part = split.partition("[")
                files = [str(file) for file in _files(folder, name)]
                where, split = dict(path="parquet", data_files={"rows": files}), f"rows{bracket}{part}"
            else:
                where = dict(path=self._name, name=self._configuration or None)
            read = functools.partial(_streamed, count=self._stream) if self._stream else datasets.load_dataset
            rows = read(**where, split=split)
        except DataError:
            raise
        except Exception as error:  # the hub client, Arrow and the loaders each have their own
            raise DataError(f"data.source.name={self._name}, split {self._split!r}: {first_line(error)}") from error
        fingerprint = rows._fingerprint
        return _undecoded(rows), fingerprint

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_rows": None}

    def __len__(self) -> int:
        return self._count

    def check(self, conversations: int) -> None:
        """Any number is right."""

    def __getitem__(self, index: int) -> Example:
        if self._rows is None:
            self._rows, _ = self._open()
        where = f"{self._name} {self._split}/{index}"
        try:
            return example_of(where, self._rows[index], self._fields)
        except (RecordError, RequestError) as error:
            raise DataError(f"{where}: {error}") from None


def _undecoded(rows: Any) -> Any:
    """The bytes of pictures as they are: they are decoded in one place."""
    import datasets

    for column, feature in (rows.features or {}).items():
        if isinstance(feature, datasets.Image):
            rows = rows.cast_column(column, datasets.Image(decode=False))
        elif isinstance(getattr(feature, "feature", None), datasets.Image):
            rows = rows.cast_column(column, datasets.List(datasets.Image(decode=False)))
    return rows


def _streamed(*, split: str, count: int, **where: Any) -> Any:
    """The first rows of a split, read as a stream unless they are kept from before."""
    import datasets

    builder = datasets.load_dataset_builder(**where)
    rows = _undecoded(builder.as_streaming_dataset(split=split).take(count))

    def read() -> Iterator[dict[str, Any]]:
        progress = Countdown(log.info, f"reading the stream of {split!r}: {{}} rows", count)
        for number, row in enumerate(rows, 1):
            progress.at(number)
            yield row

    # Another version of the set has another hash, and so has its stream.
    key = f"{builder.cache_dir} {split} {count}"
    return datasets.Dataset.from_generator(read, rows.features, fingerprint=hashlib.sha256(key.encode()).hexdigest()[:16])


def _files(folder: Path, split: str) -> list[Path]:
    found = sorted([*folder.glob(f"{split}*.parquet"), *folder.glob(f"{split}/*.parquet")])
    if not found:
        raise DataError(f"{folder}: holds no {split}*.parquet and no {split}/*.parquet; set data.source.train and eval")
    return found


@SOURCES.add(HuggingFaceConfig)
def open_hugging_face(config: DataConfig, split: Split) -> HuggingFaceSource:
    """
    Raises:
      DataError: it cannot be had; ValueError: no field is named.
    """
    source: HuggingFaceConfig = config.source
    check_fields("data.source", source.fields)
    options = dict(fields=source.fields, stream=source.stream)
    return HuggingFaceSource(source.name, source.configuration, getattr(source, split), **options)
