"""A tensorflow-datasets set by its name, read at random without TensorFlow.

It is prepared once, where TensorFlow is, in a format that can be read so::

    tfds build coco_captions --file_format=array_record --data_dir=FOLDER

How its fields make a conversation is known for `KNOWN`, and said for others by `data.source.fields`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vlm_jax.config import DataConfig
from vlm_jax.config.sources import FieldsConfig, TfdsConfig
from vlm_jax.data.example import SOURCES, Example, Source, Split
from vlm_jax.data.fields import check_fields, example_of
from vlm_jax.errors import DataError, RecordError, RequestError

KNOWN = {
    "coco_captions": FieldsConfig(image="image", answer="captions/text"),
    "clevr": FieldsConfig(image="image", question="question_answer/question", answer="question_answer/answer"),
}
HELD_OUT = ("validation", "val", "test")  # the first of these that a set has


class TfdsSource(Source):
    """One example a record; a worker process opens its files anew."""

    def __init__(self, folder: Path, split: str, fields: FieldsConfig) -> None:
        """
        Args:
          folder: of a prepared version of the set.
          split: "": the first of `HELD_OUT`.

        Raises:
          DataError: it cannot be read, or has no such split.
        """
        self._folder, self._fields = folder, fields
        self._records, self._split = self._open(split)
        self._count = len(self._records)
        info = (folder / "dataset_info.json").read_bytes()
        self.fingerprint = f"tfds {folder} {self._split} {self._count} {fields} {info!r}"

    def _open(self, split: str) -> tuple[Any, str]:
        import tensorflow_datasets as tfds

        try:
            builder = tfds.builder_from_directory(self._folder)
            names = list(builder.info.splits)
            split = split or next((name for name in HELD_OUT if name in names), "")
            if split.partition("[")[0] not in names:
                raise DataError(f"tfds {self._folder}: has the splits {', '.join(names)}; expected {split or 'one held out'}")
            # The bytes of pictures as they are: those of every source are decoded in one place.
            image = self._fields.image.split("/") if self._fields.image else []
            decoders: Any = tfds.decode.SkipDecoding()
            for part in reversed(image):
                decoders = {part: decoders}
            records = builder.as_data_source(split, decoders=decoders if image else None)
            records[0]  # a missing file is not noticed before
            return records, split
        except DataError:
            raise
        except Exception as error:  # tfds raises many kinds
            cause = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise DataError(
                f"tfds {self._folder}: {cause}. It must be prepared as array_record: tfds build NAME --file_format=array_record"
            ) from error

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_records": None}

    def __len__(self) -> int:
        return self._count

    def check(self, conversations: int) -> None:
        """Any number is right."""

    def __getitem__(self, index: int) -> Example:
        if self._records is None:
            self._records, _ = self._open(self._split)
        where = f"tfds {self._folder} {self._split}/{index}"
        try:
            return example_of(where, self._records[index], self._fields)
        except (RecordError, RequestError) as error:
            raise DataError(f"{where}: {error}") from None


def folder_of(name: str, data_dir: str) -> Path:
    """The newest prepared version of a set.

    Raises:
      DataError: there is none, or of several configurations.
    """
    root = Path(data_dir).expanduser() / name
    found = sorted(root.rglob("dataset_info.json"), key=lambda path: _version(path.parent.name))
    if not found:
        raise DataError(
            f"data.source.name={name}: {root} holds no prepared set. Prepare it where TensorFlow is installed: tfds build "
            f"{name} --file_format=array_record --data_dir={data_dir}"
        )
    configurations = sorted({path.parent.parent.name for path in found})
    if len(configurations) > 1:
        raise DataError(f"data.source.name={name}: has the configurations {', '.join(configurations)}; name one: {name}/NAME")
    return found[-1].parent


def _version(name: str) -> tuple[int, ...]:
    return tuple(int(part) if part.isdigit() else -1 for part in name.split("."))


@SOURCES.add(TfdsConfig)
def open_tfds(config: DataConfig, split: Split) -> TfdsSource:
    """
    Raises:
      DataError: the set is not prepared or cannot be read; ValueError: its fields are not known.
    """
    source: TfdsConfig = config.source
    fields = source.fields
    if fields == FieldsConfig():
        fields = KNOWN.get(source.name.partition("/")[0], fields)
    check_fields("data.source", fields)
    return TfdsSource(folder_of(source.name, source.data_dir), getattr(source, split), fields)
