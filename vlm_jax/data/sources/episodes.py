"""Examples of another source in a row: a model that is to learn from the solved examples of its prompt has to have read such.

Flamingo has them from web pages whose pictures and texts alternate (Alayrac et al. 2022, section 2.4). Here an episode is made
of examples that are drawn at random, so each answer is learned behind 0, 1, ... others.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from vlm_jax.config import DataConfig, EpisodesConfig, MixtureConfig
from vlm_jax.data.example import SOURCES, Example, Source, Split
from vlm_jax.data.packing import hash_uint64
from vlm_jax.errors import DataError
from vlm_jax.processing.conversation import joined


class EpisodesSource(Source):
    """One conversation an example: that of each of its members, one after the other."""

    def __init__(self, source: Source, *, examples: int, orders: int) -> None:
        self._source = source
        self.fingerprint = f"{orders} orders of episodes of {examples}: {source.fingerprint}"
        whole = len(source) // examples * examples  # what is left over in one order is found in the others
        shuffled = [np.argsort(hash_uint64(order, np.arange(len(source))), kind="stable")[:whole] for order in range(orders)]
        self._members = np.concatenate(shuffled).reshape(-1, examples)

    def __len__(self) -> int:
        return len(self._members)

    def __getitem__(self, index: int) -> Example:
        parts = []
        for place, member in enumerate(self._members[index]):
            example = self._source[int(member)]
            # Of an example with several conversations, one.
            chosen = int(hash_uint64(index, place) % len(example.conversations))
            parts.append((example.conversations[chosen], example.media))
        conversation, media = joined(parts)
        return Example(id=f"episode {index}", media=media, conversations=(conversation,))

    def check(self, conversations: int) -> None:
        """Any number is right."""


@SOURCES.add(EpisodesConfig)
def open_episodes(config: DataConfig, split: Split) -> Source:
    """
    Raises:
      DataError: a setting that is not right, too few examples, or a source that cannot be read.
    """
    source: EpisodesConfig = config.source
    if isinstance(source.source, EpisodesConfig | MixtureConfig):
        raise DataError(f"data.source.source is {source.source.kind!r}: expected a source of examples")
    if source.examples < 1 or source.orders < 1:
        raise DataError(f"data.source: examples={source.examples}, orders={source.orders}: expected numbers above 0")
    if config.pairs:
        raise DataError("data.pairs: pairs of answers make no episodes: name their source itself")
    opened = SOURCES[type(source.source)](dataclasses.replace(config, source=source.source), split)
    if split == "eval":
        return opened
    if len(opened) < source.examples:
        raise DataError(f"data.source: {len(opened)} examples are no episode of {source.examples}: lower data.source.examples")
    return EpisodesSource(opened, examples=source.examples, orders=source.orders)
