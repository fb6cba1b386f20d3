"""The first state of a run: from its newest checkpoint, another run, published checkpoints, or initialised."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Collection
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from vlm_jax.config import PartInit
from vlm_jax.interop.files.folder import is_published
from vlm_jax.interop.published import open_published
from vlm_jax.layers.lora import dequantised, merged, names_of, only_adapters, with_adapters, without_adapters
from vlm_jax.paths import Params, by_path, nested
from vlm_jax.sharding import Named, unboxed
from vlm_jax.training.checkpoint import Checkpoints, load_run
from vlm_jax.training.params import Blueprint
from vlm_jax.training.run_folder import PUBLISHED, CheckpointError, unseal
from vlm_jax.training.step import Trainer, TrainState

log = logging.getLogger(__name__)


def first_state(trainer: Trainer, checkpoints: Checkpoints, folder: Path) -> tuple[TrainState, int]:
    """The state, and how many steps were done.

    Args:
      folder: of the run; a published checkpoint's configuration is kept there, for `api.export`.

    Raises:
      CheckpointError: `init_from` or `init_parts` do not fit the model.
      PublishedError: they cannot be read.
    """
    restored = checkpoints.restore(trainer)
    if restored is not None:
        return restored
    config = trainer.config
    unseal(folder)
    if config.init_from and config.init_parts:
        raise CheckpointError("config.init_from is for the whole model and config.init_parts for its parts: set one of them")
    if config.init_parts:
        _warn_of_unaligned(trainer)
        parts: dict[str, Any] = {}
        for part in config.init_parts:
            parts |= {f"{config.model.part_path(part.part)}/{name}": leaf for name, leaf in _part(trainer, part).items()}
        return trainer.state_of(nested(trainer.initial_params(without=parts) | parts)), 0
    if not config.init_from:
        return trainer.init(), 0
    if is_published(config.init_from):
        published = open_published(config.init_from, pickles=config.pickles)
        params = published.load_params(trainer.mesh)
        if jax.process_index() == 0:
            part = folder / f".{PUBLISHED}.part"
            for old in (part, folder / PUBLISHED):  # of another `init_from`, before the first checkpoint
                shutil.rmtree(old, ignore_errors=True)
            published.keep_files(part)
            part.rename(folder / PUBLISHED)
    else:
        params = _of_run(config.init_from, trainer)
    _check(f"config.init_from={config.init_from}", params, trainer.blueprint, taken=names_of(params))
    state = trainer.state_of(params)
    trainer.objective.check_start(state.trained)
    return state, 0


def _of_run(path: str, trainer: Trainer) -> Params:
    """The parameters of a run; its adapters are taken along where the new run has some of that name, and merged if not."""
    params = load_run(path, trainer.mesh).params
    wanted = {one.name for one in trainer.config.adapters}
    left = [name for name in names_of(params) if name not in wanted]
    if not left:
        return params
    log.warning("config.init_from=%s: its adapters %s are merged: config.adapters has none of the name", path, ", ".join(left))
    apart = lambda params: with_adapters(merged(without_adapters(params, left)), only_adapters(params, wanted))
    return jax.jit(apart)(params)


def _warn_of_unaligned(trainer: Trainer) -> None:
    """LLaVA's first stage (Liu et al. 2023) trains the connector alone, before the language model reads what it gives."""
    parts = {part.part for part in trainer.config.init_parts}
    of_language = [rule for path, rule in trainer.rules.items() if path.startswith("language/")]
    trained = any(not rule.frozen and not rule.rows_from for rule in of_language)
    if "language" in parts and "connector" not in parts and trained and trainer.config.model.has_vision:
        log.warning(
            "stage 1 is skipped: the connector starts untrained while the pretrained language model is trained; train the "
            "connector alone first (language frozen), and name that run as config.init_from"
        )


def _part(trainer: Trainer, init: PartInit) -> dict[str, jax.Array]:
    """The parameters of one part by path.

    Tokens that its vocabulary lacks begin as the mean of those it has (Hewitt 2021), and `new_layers` untrained behind its own.
    """
    path = f"{trainer.config.model.part_path(init.part)}/"
    within = lambda tree: {one.removeprefix(path): leaf for one, leaf in by_path(tree).items() if one.startswith(path)}
    wanted = within(trainer.blueprint.without_held)
    name = f"config.init_parts {init.part}={init.checkpoint}"
    if not wanted:
        raise CheckpointError(
            f"{name}: config.model has no part of that name; it has {', '.join(trainer.blueprint.without_held)}"
        )
    if is_published(init.checkpoint):
        published = open_published(init.checkpoint, pickles=trainer.config.pickles)
        found = published.config.part(published.load_params(trainer.mesh), init.part)
    else:
        run = load_run(init.checkpoint, trainer.mesh)
        found = run.config.model.part(run.params, init.part)
        found = found and jax.jit(lambda part: dequantised(merged(part)))(found)
    if found is None:
        raise CheckpointError(f"{name}: this checkpoint has no part of that name")
    names = {one: box.names for one, box in within(trainer.blueprint.boxed).items() if isinstance(box, Named)}
    sizes = {one: leaf.shape for one, leaf in wanted.items()}
    found = {one: _with_new_tokens(leaf, names.get(one, ()), sizes.get(one)) for one, leaf in by_path(found).items()}
    if init.new_layers:
        stacked = [one for one in found if names.get(one, ())[:1] == ("layers",)]
        others = by_path(trainer.blueprint.without_held).keys() - {path + one for one in stacked}
        new = trainer.initial_params(without=others)
        own = found[stacked[0]].shape[0]
        log.warning("%s: its %d layers come first, and %d behind them start untrained", name, own, init.new_layers)
        found |= {one: jnp.concatenate([found[one], new[path + one][-init.new_layers :]]) for one in stacked}
    _compare(name, found, wanted)
    return found


def _with_new_tokens(leaf: jax.Array, names: tuple[str | None, ...], shape: tuple[int, ...] | None) -> jax.Array:
    if shape is None or "vocab" not in names or leaf.ndim != len(shape):
        return leaf
    axis = names.index("vocab")
    missing = shape[axis] - leaf.shape[axis]
    if missing <= 0:
        return leaf
    mean = jnp.mean(leaf, axis, keepdims=True)
    return jnp.concatenate([leaf, jnp.repeat(mean, missing, axis)], axis)


def _check(name: str, params: Params, blueprint: Blueprint, *, taken: Collection[str]) -> None:
    """Compares the shapes of parameters with those of the run; adapters that are not `taken` along begin anew."""
    wanted = by_path(blueprint.without_held)
    wanted |= by_path(only_adapters(unboxed(blueprint.boxed), taken))
    _compare(name, by_path(params), wanted)


def _compare(name: str, params: dict[str, Any], wanted: dict[str, Any]) -> None:
    shapes = lambda leaves: {path: leaf.shape for path, leaf in leaves.items() if not path.endswith("/kernel_scale")}
    expected, found = shapes(wanted), shapes(params)
    if expected != found:
        wrong = [path for path in sorted(expected.keys() | found.keys()) if expected.get(path) != found.get(path)]
        is_now, should = (shapes.get(wrong[0], "not there") for shapes in (found, expected))
        raise CheckpointError(
            f"{name}: its model has other parts or sizes than config.model in {len(wrong)} parameters; "
            f"{wrong[0]} is {is_now} and should be {should}"
        )
