"""Published weights <-> our parameters, by a table (`table.py`); every name is accounted for in both directions.

Reading, each parameter is made shard by shard on the devices that hold it, from the bytes of the published tensors that those
shards are made of: the host never holds more than a parameter's shards of one process at a time.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax.sharding import Mesh

from vlm_jax.interop.files.source import Arrays, Source
from vlm_jax.interop.plan import Problems, plan, resolve
from vlm_jax.interop.table import Index, Shape, Table, pattern, published_name
from vlm_jax.paths import by_path, nested
from vlm_jax.sharding import boxed_params, place_tree, shardings_of, unboxed

State = dict[str, np.ndarray]


def abstract_params(model: nn.Module) -> Any:
    """Shapes and types of a model's parameters; nothing is computed."""
    return unboxed(boxed_params(model))


def to_ours(state: State, table: Table, abstract_params: Any) -> Any:
    """Published weights in memory -> our parameters as NumPy arrays, in the type they come in.

    Args:
      abstract_params: our parameters or their shapes.

    Raises:
      ConversionError: a name, a shape or a value does not fit.
    """
    source = Arrays(state)
    shapes = _shapes(abstract_params)
    parameters = plan(table, source, shapes)
    whole = lambda shape: tuple(slice(0, size) for size in shape)
    return nested({path: parameters[path].read(source, whole(shape)) for path, shape in shapes.items()})


def names_known(table: Table, source: Source) -> int:
    """Number of the source's tensors that the table has a row for: chooses between several tables."""
    patterns = [pattern(name) for row in table.rows for name in row.published]
    return sum(any(regex.fullmatch(name) for regex in patterns) for name in source.tensors)


def load_params(
    source: Source,
    table: Table,
    boxed: Any,
    mesh: Mesh,
    *,
    dtype: Any = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Any:
    """Published weights -> our parameters on the mesh.

    Args:
      boxed: shapes and axis names of our parameters (`boxed_params`).
      dtype: to hold them in; None: the type they come in.
      progress: called with the bytes read so far and in all.

    Raises:
      ConversionError: a name, a shape or a value does not fit; PublishedError: a tensor cannot be read.
    """
    shapes = _shapes(unboxed(boxed))
    parameters = plan(table, source, shapes)
    shardings = by_path(shardings_of(place_tree(boxed, mesh), mesh))
    total = sum(int(np.prod(tensor.shape)) * tensor.dtype.itemsize for tensor in source.tensors.values())
    params, done = {}, 0
    for path, parameter in parameters.items():
        shape = shapes[path]
        shards: dict[Index, np.ndarray] = {}  # replicas are read once

        def shard(index: Index, parameter=parameter, shape=shape, shards=shards) -> np.ndarray:
            bounded = tuple(slice(*part.indices(size)[:2]) for part, size in zip(index, shape, strict=True))
            key = tuple((part.start, part.stop) for part in bounded)
            if key not in shards:
                shards[key] = parameter.read(source, bounded, dtype)
            return shards[key]

        params[path] = jax.make_array_from_callback(shape, shardings[path], shard)
        # Waiting keeps the arrays of one parameter, not of all, alive on the host.
        params[path].block_until_ready()
        done += params[path].nbytes
        progress(min(done, total), total)
    return nested(params)


def to_published(params: Any, table: Table) -> State:
    """The inverse of `to_ours`, without the ignored names and the copies.

    Raises:
      ConversionError: a parameter has no row or a row no parameter; it lists all of them.
    """
    return dict(published_tensors(params, table))


def published_tensors(params: Any, table: Table) -> Iterator[tuple[str, np.ndarray]]:
    """Name and tensor, one by one, so that the host holds one of them at a time. Raises as `to_published`."""
    problems = Problems()
    flat = by_path(params)
    resolved = resolve(table, {path: tuple(leaf.shape) for path, leaf in flat.items()}, problems)
    problems.check()
    for one in resolved:
        for numbers in one.places():
            whole = one.axes.joined([np.asarray(flat[path][numbers]) for path in one.row.ours])
            ends = list(itertools.accumulate(one.row.split))
            parts = np.split(whole, ends[:-1]) if ends else [whole]
            for template, part in zip(one.row.published, parts, strict=True):
                yield published_name(template, numbers), np.asarray(part, order="C")
    for empty in table.empty:
        yield published_name(empty.name, ()), np.zeros(empty.shape, next(iter(flat.values())).dtype)


def _shapes(params: Any) -> Mapping[str, Shape]:
    return {path: tuple(leaf.shape) for path, leaf in by_path(params).items()}
