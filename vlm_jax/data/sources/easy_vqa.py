"""easy-VQA, prepared once by tensorflow-datasets and read at random without TensorFlow."""

from __future__ import annotations

import contextlib
import io
import logging
import tempfile
import time
from pathlib import Path
from typing import Any, Literal

from vlm_jax.config import DataConfig, EasyVqaConfig
from vlm_jax.data.example import SOURCES, Example, Source, Split
from vlm_jax.errors import DataError
from vlm_jax.processing.conversation import Medium, Text, assistant, user

log = logging.getLogger(__name__)

# (pictures, questions), as its authors state them
COUNTS = {"train": (4_000, 38_575), "test": (1_000, 9_673)}


class EasyVqaSource(Source):
    """One example a picture, one sequence a question, or all of them the turns of one."""

    def __init__(self, split: Literal["train", "test"], cache_dir: str | Path, *, conversations: bool = False) -> None:
        """Prepares the set in `cache_dir` on first use.

        Args:
          conversations: the questions about a picture follow one another in one conversation.

        Raises:
          DataError: the prepared set cannot be read or is not whole.
        """
        self._split, self._conversations = split, conversations
        self.fingerprint = f"easy-VQA {split} {COUNTS[split]}" + (" conversations" if conversations else "")
        self._folder = Path(cache_dir).expanduser()
        prepare(self._folder)
        self._records = self._open()
        if len(self._records) != COUNTS[split][0]:
            raise self._damaged(f"{len(self._records)} pictures of {split!r}, expected {COUNTS[split][0]}")

    def _damaged(self, cause: str) -> DataError:
        return DataError(f"easy-VQA in {self._folder}: {cause}. Delete {self._folder / 'easy_vqa'}; it will be made anew")

    def _open(self) -> Any:
        import tensorflow_datasets as tfds

        try:
            # The PNG bytes as they are: pictures of every source are decoded in one place.
            decoders = {"image": tfds.decode.SkipDecoding()}
            records = _builder(self._folder).as_data_source(self._split, decoders=decoders)
            records[0]  # a missing file is not noticed before
            return records
        except Exception as error:  # tfds raises many kinds
            raise self._damaged(str(error)) from error

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_records": None}

    def __len__(self) -> int:
        return COUNTS[self._split][0]

    def __getitem__(self, index: int) -> Example:
        if self._records is None:  # in a worker process
            self._records = self._open()
        record = self._records[index]
        asked = record["questions"]
        pairs = zip(asked["question"], asked["answer"], strict=True)
        turns = [(Text(question.decode()), assistant(answer.decode())) for question, answer in pairs]
        if self._conversations:
            first = user(Medium(0), turns[0][0])
            rest = [turn for question, answer in turns[1:] for turn in (user(question), answer)]
            conversations = ((first, turns[0][1], *rest),)
        else:
            conversations = tuple((user(Medium(0), question), answer) for question, answer in turns)
        number = int(record["image_id"])
        return Example(f"easy-VQA {self._split}/{number}", ((bytes(record["image"]),),), conversations)

    def check(self, questions: int) -> None:
        """Compares the number of questions, or of pictures, read with the published one.

        Raises:
          DataError: they differ.
        """
        expected = COUNTS[self._split][0 if self._conversations else 1]
        if questions != expected:
            what = "conversations" if self._conversations else "questions"
            raise self._damaged(f"{questions} {what} of {self._split!r}, expected {expected}")


def _builder(folder: Path) -> Any:
    from vlm_jax.data.easy_vqa_builder import EasyVqa

    return EasyVqa(data_dir=str(folder), file_format="array_record")


def prepare(folder: Path) -> None:
    """Writes the set under `folder`, unless it is there.

    It is made in a folder of its own and renamed at the end: several processes may do so at once, the first one wins; one
    that is interrupted leaves nothing that could be mistaken for a whole set.

    Raises:
      OSError: `folder` cannot be written.
    """
    whole = folder / "easy_vqa"
    if whole.exists():
        return
    import tensorflow_datasets as tfds

    began = time.perf_counter()
    log.info("easy-VQA: preparing it in %s, once", whole)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".preparing-", dir=folder) as made:
        tfds.disable_progress_bar()
        try:
            # tfds prints that it downloads, and where to: neither is so.
            with contextlib.redirect_stdout(io.StringIO()):
                _builder(Path(made)).download_and_prepare()
        finally:
            tfds.enable_progress_bar()
        try:
            (Path(made) / "easy_vqa").rename(whole)
        except OSError:
            if not whole.exists():  # otherwise another process was first
                raise
    log.info("easy-VQA: prepared in %.1f s", time.perf_counter() - began)


@SOURCES.add(EasyVqaConfig)
def open_easy_vqa(config: DataConfig, split: Split) -> EasyVqaSource:
    source = config.source
    conversations = source.conversations and split == "train"
    return EasyVqaSource({"train": "train", "eval": "test"}[split], source.cache_dir, conversations=conversations)
