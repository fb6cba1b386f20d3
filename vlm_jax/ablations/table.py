"""A table of ablations: its rows, what each changes, and what the paper measured."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax

from vlm_jax.config import MeshConfig, PartInit, RunConfig, VisionConfig
from vlm_jax.config.register import Register, module_of
from vlm_jax.sharding import make_mesh
from vlm_jax.training.params import Blueprint


@dataclasses.dataclass(frozen=True, kw_only=True)
class Kit:
    """What rows put in the place of the baseline's parts, at the size of a base.

    Attributes:
      frozen_layers: of the language model that the baseline keeps frozen.
      encoders: vision encoders by the role they have in a table, each with what it starts from; None: random.
      grafted_layers: how many language layers "grafting" adds.
      mlp_layers: of the MLP in the place of a resampler.
      resamplers: what the sizes of a resampler change in its configuration, by name.
    """

    frozen_layers: int
    encoders: Mapping[str, tuple[VisionConfig, PartInit | None]]
    grafted_layers: int
    mlp_layers: int
    resamplers: Mapping[str, Mapping[str, Any]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Base:
    """A run that a table's rows change, at one size.

    Attributes:
      run: the baseline.
      left_out: rows that cannot be had at this size, with the reason.
    """

    run: RunConfig
    kit: Kit
    left_out: Mapping[str, str] = dataclasses.field(default_factory=dict)


Change = Callable[[RunConfig, Kit], RunConfig]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One row of a table.

    Attributes:
      name: as it is called on the command line; group: the paper's.
      setting: what is changed, with the baseline's value; changed: to what.
      published: the paper's numbers by column; parameters in billions, step time in seconds.
    """

    name: str
    group: str
    setting: str
    changed: str
    change: Change
    published: Mapping[str, float]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Table:
    """A published table.

    Attributes:
      columns: the names of the scores.
      overall: scores by column -> the paper's summary of them.
    """

    name: str
    paper: str
    columns: tuple[str, ...]
    rows: tuple[Row, ...]
    overall: Callable[[Mapping[str, float]], float]

    def __getitem__(self, name: str) -> Row:
        """
        Raises:
          KeyError: there is no such row.
        """
        return {row.name: row for row in self.rows}[name]


TABLES: Register[Table] = Register("a table of ablations", "vlm_jax.ablations")


def parameters(run: RunConfig) -> tuple[int, int]:
    """All of a run's parameters, and those that it trains, from shapes alone."""
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    return Blueprint.of(module_of(run.model)(run.model), run.optimizer.rules, mesh, run.adapters).counts


def changed(config: Any, path: str, **values: Any) -> Any:
    """A configuration with other values in the part at a dotted `path`; "": in itself."""
    if not path:
        return dataclasses.replace(config, **values)
    first, _, rest = path.partition(".")
    return dataclasses.replace(config, **{first: changed(getattr(config, first), rest, **values)})


def of_fields(path: str, **values: Any) -> Change:
    """A row's change that only sets fields."""
    return lambda run, kit: changed(run, path, **values)


def unchanged(run: RunConfig, kit: Kit) -> RunConfig:
    return run
