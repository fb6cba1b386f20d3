"""A set of Hugging Face `datasets`: a hub name, or a folder of parquet files (`pip install 'vlm_jax[datasets]'`).

    --config.data.source.name=HuggingFaceM4/VQAv2 --config.data.source.fields.question=question \\
        --config.data.source.fields.answer=multiple_choice_answer

It is fetched whole, as `load_dataset` keeps it, and mapped into memory. A stream (`streaming=True`) is not read: a run names
every row by a number, and a stream has no numbers; name a part of the set, "train[:100000]", or its shards in a folder.

In a folder, `train-*.parquet` or `train/*.parquet` are the files of a split.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vlm_jax.config import DataConfig
from vlm_jax.config.sources import FieldsConfig, HuggingFaceConfig
from vlm_jax.data.example import SOURCES, Example, Source, Split
from vlm_jax.data.fields import check_fields, example_of
from vlm_jax.errors import DataError, RecordError, RequestError, first_line


class HuggingFaceSource(Source):
    """One example a row; a worker process opens the set anew."""

    def __init__(self, name: str, configuration: str, split: str, fields: FieldsConfig) -> None:
        """
        Raises:
          DataError: it cannot be had, or `datasets` is not installed.
        """
        self._name, self._configuration, self._split, self._fields = name, configuration, split, fields
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
        try:
            if folder.is_dir():
                files = [str(file) for file in _files(folder, self._split.partition("[")[0])]
                part = self._split.removeprefix(self._split.partition("[")[0])
                rows = datasets.load_dataset("parquet", data_files={"rows": files}, split=f"rows{part}")
            else:
                rows = datasets.load_dataset(self._name, self._configuration or None, split=self._split)
        except DataError:
            raise
        except Exception as error:  # the hub client, Arrow and the loaders each have their own
            raise DataError(f"data.source.name={self._name}, split {self._split!r}: {first_line(error)}") from error
        fingerprint = rows._fingerprint
        for column, feature in rows.features.items():  # the bytes as they are: pictures are decoded in one place
            if isinstance(feature, datasets.Image):
                rows = rows.cast_column(column, datasets.Image(decode=False))
            elif isinstance(getattr(feature, "feature", None), datasets.Image):
                rows = rows.cast_column(column, datasets.List(datasets.Image(decode=False)))
        return rows, fingerprint

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
    return HuggingFaceSource(source.name, source.configuration, getattr(source, split), source.fields)
