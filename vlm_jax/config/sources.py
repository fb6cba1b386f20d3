"""Data sets that others published, as they published them."""

from __future__ import annotations

from typing import Literal

from vlm_jax.config.data import SourceConfig
from vlm_jax.config.frozen import frozen


@frozen
class TarConfig(SourceConfig):
    """Tar shards in webdataset's layout, as img2dataset writes them: see `vlm_jax/data/sources/tar.py`."""

    kind: Literal["tar"] = "tar"
    train: str  # a file, or several: "shards/*.tar", "shards/{00000..00199}.tar"
    eval: str
    bad_lines: Literal["error", "skip"] = "error"  # skip: counted and reported


@frozen
class FieldsConfig:
    """How a table's record becomes an example: the names of its fields, "a/b" the field b of each a.

    Questions and answers that are lists give a conversation a pair; answers alone are captions.
    """

    image: str = "image"  # a picture, or a list of them; "": there is none
    question: str = ""
    answer: str = ""
    conversation: str = ""  # turns as in LLaVA's JSON or messages, in the place of question and answer


@frozen
class TfdsConfig(SourceConfig):
    """A tensorflow-datasets set that was prepared as array_record: see `vlm_jax/data/sources/tfds.py`."""

    kind: Literal["tfds"] = "tfds"
    name: str  # "clevr", or with its configuration "coco_captions/2014"
    data_dir: str = "~/tensorflow_datasets"
    train: str = "train"  # splits, also in part: "train[:10%]"
    eval: str = ""  # "": the set's own validation, or else its test split
    fields: FieldsConfig = FieldsConfig()  # its default is the known one of coco_captions and clevr
    bad_lines: Literal["error", "skip"] = "error"


@frozen
class HuggingFaceConfig(SourceConfig):
    """A set of Hugging Face `datasets`: see `vlm_jax/data/sources/hugging_face.py`."""

    kind: Literal["hugging_face"] = "hugging_face"
    name: str  # of the hub, or a folder of parquet files
    configuration: str = ""  # of the set, where it has several
    train: str = "train"  # splits, also in part: "train[:10%]"
    eval: str = "validation"
    stream: int = 0  # so many rows of each split are read as a stream and kept; 0: all of it is fetched
    fields: FieldsConfig
    bad_lines: Literal["error", "skip"] = "error"
