"""The first state of a run: from its newest checkpoint, another run, published checkpoints, or initialised."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp

from vlm_jax.config import PartInit
from vlm_jax.interop.files.folder import is_published
from vlm_jax.interop.published import open_published
from vlm_jax.paths import by_path, nested
from vlm_jax.sharding import Named
from vlm_jax.training.checkpoint import Checkpoints, load_run
from vlm_jax.training.run_folder import PUBLISHED, CheckpointError, unseal
from vlm_jax.training.step import Trainer, TrainState

Shape = tuple[int, ...]
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
        params = by_path(trainer.init().params)
        for part in config.init_parts:
            params |= {f"{config.model.part_path(part.part)}/{name}": leaf for name, leaf in _part(trainer, part).items()}
        return trainer.state_of(nested(params)), 0
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
        params = load_run(config.init_from, trainer.mesh).params
    shapes = lambda tree: {path: leaf.shape for path, leaf in by_path(tree).items()}
    _check(f"config.init_from={config.init_from}", shapes(params), shapes(trainer.abstract_state.params))
    return trainer.state_of(params), 0


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
    """The parameters of one part by path; tokens that its vocabulary lacks begin as the mean of those it has (Hewitt 2021)."""
    path = f"{trainer.config.model.part_path(init.part)}/"
    within = lambda tree: {one.removeprefix(path): leaf for one, leaf in by_path(tree).items() if one.startswith(path)}
    sizes = {one: leaf.shape for one, leaf in within(trainer.abstract_state.params).items()}
    name = f"config.init_parts {init.part}={init.checkpoint}"
    if not sizes:
        raise CheckpointError(
            f"{name}: config.model has no part of that name; it has {', '.join(trainer.abstract_state.params)}"
        )
    if is_published(init.checkpoint):
        published = open_published(init.checkpoint, pickles=trainer.config.pickles)
        found = published.config.part(published.load_params(trainer.mesh), init.part)
    else:
        run = load_run(init.checkpoint, trainer.mesh)
        found = run.config.model.part(run.params, init.part)
    if found is None:
        raise CheckpointError(f"{name}: this checkpoint has no part of that name")
    names = jax.tree.map(lambda box: box.names, trainer.blueprint.boxed, is_leaf=lambda x: isinstance(x, Named))
    boxes = within(names)
    found = {one: _with_new_tokens(leaf, boxes.get(one, ()), sizes.get(one)) for one, leaf in by_path(found).items()}
    _check(name, {one: leaf.shape for one, leaf in found.items()}, sizes)
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


def _check(name: str, found: dict[str, Shape], expected: dict[str, Shape]) -> None:
    if expected != found:
        wrong = [path for path in sorted(expected.keys() | found.keys()) if expected.get(path) != found.get(path)]
        is_now, should = (shapes.get(wrong[0], "not there") for shapes in (found, expected))
        raise CheckpointError(
            f"{name}: its model has other parts or sizes than config.model in {len(wrong)} parameters; "
            f"{wrong[0]} is {is_now} and should be {should}"
        )
