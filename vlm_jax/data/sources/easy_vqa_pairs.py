"""Pairs of a right and a wrong answer to easy-VQA's questions, for the objective "preference".

All are of the set's training split, so that its test split stays what a run was never trained on: every tenth picture is held
out for the run's own evaluation.
"""

from __future__ import annotations

from pathlib import Path

from vlm_jax.config import DataConfig, EasyVqaPairsConfig
from vlm_jax.data.example import SOURCES, Example, Source, Split
from vlm_jax.data.packing import hash_uint64
from vlm_jax.data.sources.easy_vqa import EasyVqaSource
from vlm_jax.processing.conversation import assistant

HELD_OUT = 10  # every so many pictures
KINDS = (  # answers of one kind: a wrong answer is another one of the same
    ("yes", "no"),
    ("circle", "rectangle", "triangle"),
    ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow"),
)


def wrong_answer(right: str, seed: int) -> str:
    """Another answer of the same kind: of yes and no the other one, else one chosen by a hash of `seed`."""
    others = next([other for other in kind if other != right] for kind in KINDS if right in kind)
    return others[int(hash_uint64(seed)) % len(others)]


class EasyVqaPairsSource(Source):
    """One example a picture, a pair a question."""

    def __init__(self, split: Split, cache_dir: str | Path) -> None:
        """
        Raises:
          DataError: as for `EasyVqaSource`.
        """
        self._all = EasyVqaSource("train", cache_dir)
        held_out = split == "eval"
        self._pictures = [index for index in range(len(self._all)) if (index % HELD_OUT == 0) == held_out]
        self.fingerprint = f"{self._all.fingerprint} pairs {split} {HELD_OUT} {KINDS}"

    def __len__(self) -> int:
        return len(self._pictures)

    def __getitem__(self, index: int) -> Example:
        picture = self._pictures[index]
        example = self._all[picture]
        pairs = []
        for number, (question, answer) in enumerate(example.conversations):
            seed = hash_uint64(picture, number)
            pairs += [(question, answer), (question, assistant(wrong_answer(answer.text, seed)))]
        return Example(example.id, example.media, tuple(pairs), pairs=True)

    def check(self, conversations: int) -> None:
        """The number of questions is checked by the whole split's own source."""


@SOURCES.add(EasyVqaPairsConfig)
def open_easy_vqa_pairs(config: DataConfig, split: Split) -> EasyVqaPairsSource:
    return EasyVqaPairsSource(split, config.source.cache_dir)
