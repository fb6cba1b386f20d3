"""A mixture of sources: their examples one after the other under running numbers."""

from __future__ import annotations

import dataclasses

import numpy as np

from vlm_jax.config import DataConfig, MixtureConfig
from vlm_jax.config.mixture import check_named
from vlm_jax.data.example import SOURCES, Example, Source, Split
from vlm_jax.data.mixture import MixedStore
from vlm_jax.data.store import TokenStore
from vlm_jax.errors import DataError


class MixedSource(Source):
    """
    Attributes:
      members: by name; each has a token store of its own.
    """

    def __init__(
        self, members: dict[str, Source], weights: dict[str, float], *, shares: bool, phases: tuple[int, ...] = ()
    ) -> None:
        """
        Args:
          shares: whether the weights are shares of the examples; else how often a member is seen in an epoch.
          phases: of the members, as `MixedStore` has them.
        """
        self.members, self._weights, self._shares, self._phases = members, weights, shares, phases
        self.fingerprint = f"mixture {[(name, member.fingerprint) for name, member in members.items()]}"
        self._starts = np.cumsum([0, *map(len, members.values())])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, index: int) -> Example:
        member = int(np.searchsorted(self._starts, index, side="right")) - 1
        return list(self.members.values())[member][index - int(self._starts[member])]

    def check(self, conversations: int) -> None:
        """Every member is checked where it is tokenised."""

    def joined(self, stores: list[TokenStore]) -> MixedStore:
        """The stores of its members, in their order, as one."""
        return MixedStore(tuple(stores), tuple(self._weights.values()), shares=self._shares, phases=self._phases)


@SOURCES.add(MixtureConfig)
def open_mixture(config: DataConfig, split: Split) -> MixedSource:
    """
    Raises:
      DataError: names, weights or members that are not right, or a member that cannot be read.
    """
    source: MixtureConfig = config.source
    members = sorted(source.members, key=lambda member: member.name)
    _check(source)
    if split == "eval":
        members = [member for member in members if member.evaluate]
        if not members:
            raise DataError("data.source.members: evaluate is False for all; an evaluation needs one of them")
    opened: dict[str, Source] = {}
    for member in members:
        try:
            opened[member.name] = SOURCES[type(member.source)](dataclasses.replace(config, source=member.source), split)
        except DataError as error:
            raise DataError(f"data.source.members.{member.name}: {error}") from error
    weights = {member.name: member.weight for member in members}
    phases = tuple(member.phase for member in members)
    return MixedSource(opened, weights, shares=source.weights == "share", phases=phases if any(phases) else ())


def _check(source: MixtureConfig) -> None:
    if not source.members:
        raise DataError("data.source.members is empty; a mixture needs at least one source")
    try:
        check_named(source.members, "data.source.members")
    except ValueError as error:
        raise DataError(str(error)) from None
    for member in source.members:
        where = f"data.source.members.{member.name}"
        if isinstance(member.source, MixtureConfig):
            raise DataError(f"{where}: is a mixture itself; name its members here")
        if member.source.bad_lines != "error":
            raise DataError(f"{where}.source.bad_lines: set data.source.bad_lines, which is for all members")
