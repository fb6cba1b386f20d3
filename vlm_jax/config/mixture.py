"""Several data sets in one run: mixed into one stream (`MixtureConfig`), or each with batches of its own (`SetConfig`)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import ClassVar, Literal

from vlm_jax.config.data import DataConfig, SourceConfig
from vlm_jax.config.frozen import frozen

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")


@frozen
class MemberConfig:
    """A source in a mixture; on the command line `--config.data.source.members.NAME.weight=2`."""

    by_name: ClassVar[bool] = True
    name: str
    source: SourceConfig
    weight: float = 1.0
    phase: int = 0  # of an epoch: what members of lower phases give comes first, as a curriculum
    evaluate: bool = True  # whether there are held-out examples of it; False: none are looked for


@frozen
class MixtureConfig(SourceConfig):
    """Several sources in one stream of rows, which share their prompts, their processor and what a row takes.

    An example is drawn again only when all others of its member were. Tokens are kept a member: another weight costs no
    tokenising. The order of the members says nothing.
    """

    kind: Literal["mixture"] = "mixture"
    members: tuple[MemberConfig, ...]
    # What a weight means. "epochs": how often a member is seen in an epoch of the mixture, 0.25 a quarter of its examples and
    # the next quarter in the next epoch. "share": its share of the examples in a row's stream, relative to the other weights.
    weights: Literal["epochs", "share"] = "epochs"
    bad_lines: Literal["error", "skip"] = "error"  # of all members; theirs stay "error"


@frozen
class SetConfig:
    """A data set that is learned beside `RunConfig.data`, with batches of its own number and shape of rows.

    On the command line: `--config.accumulated.NAME.data.source.train=pairs.jsonl`.
    """

    by_name: ClassVar[bool] = True
    name: str
    data: DataConfig  # of the same tokenizer or processor as the run's own
    weight: float  # of its mean loss in an update; that of `RunConfig.data` has 1
    every: int = 1  # it is in the first of so many updates; 1: in all
    evaluate: bool = True  # whether there are held-out examples of it


def check_named(parts: Sequence[MemberConfig | SetConfig], where: str) -> None:
    """
    Raises:
      ValueError: a name that cannot stand in those of metrics, or twice, or a weight that is no number above 0.
    """
    names = [part.name for part in parts]
    for part in parts:
        if not NAME.fullmatch(part.name) or names.count(part.name) > 1:
            raise ValueError(f"{where}.{part.name}: expected names of letters, digits, '_' and '-', each once")
        if not 0 < part.weight < float("inf"):
            raise ValueError(f"{where}.{part.name}.weight={part.weight}: expected a number above 0; leave it out instead of 0")
