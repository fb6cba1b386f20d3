"""A run's folder, and its checkpoints.

RUN/config.json         what the run was started with
RUN/tokenizer/          the tokenizer, as transformers saves it; or
RUN/processor/          a published checkpoint's own processing (`processors.py`)
RUN/checkpoints/STEP/   Orbax: `state` (sharded arrays) and `meta` (place in the data, fingerprint)
RUN/published/          of the published checkpoint it was started from, everything but the weights
RUN/damaged/STEP/       checkpoints that could not be read, moved aside
RUN/metrics.jsonl       a line a step; RUN/tensorboard/ the same for TensorBoard
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from absl import logging
from jax.sharding import Mesh
from orbax.checkpoint.checkpoint_managers import preservation_policy as keep

from vlm_jax.config import RunConfig
from vlm_jax.config.register import module_of
from vlm_jax.config_dict import from_dict, to_dict
from vlm_jax.errors import first_line
from vlm_jax.training.params import Blueprint, merge, split
from vlm_jax.training.step import Trainer, TrainState

PUBLISHED = "published"

# What may change between a start and its continuation: nothing that changes the numbers.
MAY_CHANGE_ON_RESUME = {
    "mesh",
    "remat",
    "log_every",
    "eval_every",
    "eval_rows",
    "save_every",
    "keep_last",
    "keep_best",
    "init_from",
    "init_parts",
    "data.workers",
    "data.cache_dir",
    "data.processor",  # it is kept in the run's folder
    "pickles",
    "data.source.cache_dir",
}


class CheckpointError(ValueError):
    """A run's folder that is missing, damaged, or of another configuration."""


def fingerprint(tree: Any) -> jax.Array:
    """[] uint32, the wrapping sum of all bits: exact, and the same for every sharding. A flipped bit changes it."""
    words = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint32}

    def of(leaf: jax.Array) -> jax.Array:
        bits = jax.lax.bitcast_convert_type(leaf, words[leaf.dtype.itemsize])
        return jnp.sum(bits, dtype=jnp.uint32)

    # Weighted by its place, so that two leaves of the same shape cannot be exchanged unseen.
    leaves = enumerate(jax.tree.leaves(tree))
    return jnp.sum(jnp.stack([of(leaf) * jnp.uint32(2 * i + 1) for i, leaf in leaves]), dtype=jnp.uint32)


def differences(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[str]:
    """`name: old -> new` for every leaf that differs, those in `MAY_CHANGE_ON_RESUME` left out."""
    found = []
    for key in sorted(old.keys() | new.keys()):
        name = f"{prefix}{key}"
        before, after = old.get(key), new.get(key)
        if name in MAY_CHANGE_ON_RESUME or before == after:
            continue
        if isinstance(before, dict) and isinstance(after, dict):
            found += differences(before, after, f"{name}.")
        else:
            found.append(f"{name}: {before!r} -> {after!r}")
    return found


def read_config(folder: str | Path) -> RunConfig:
    """The configuration of a run.

    Raises:
      CheckpointError: there is no such folder, it is not a run, or one of another version.
    """
    path = Path(folder).expanduser() / "config.json"
    if not path.parent.is_dir():
        raise CheckpointError(f"no checkpoint at {path.parent}: there is no such folder")
    if not path.is_file():
        raise CheckpointError(f"no checkpoint at {path.parent}: it holds no config.json, so it is not a run's --workdir")
    try:
        return from_dict(RunConfig, json.loads(path.read_text()))
    except ValueError as error:
        raise CheckpointError(
            f"{path} is damaged, or was written by another version of vlm_jax, and only that version can read it: {error}"
        ) from error


def write_or_check_config(folder: Path, config: RunConfig) -> None:
    """Writes the configuration of a new run, or compares that of an old one with `config`.

    Raises:
      CheckpointError: the run was started with another configuration; the message shows the difference.
    """
    path = folder / "config.json"
    as_json = lambda config: json.loads(json.dumps(to_dict(config)))
    new = as_json(config)
    if path.exists():
        # Fields that an older version did not have are at their defaults.
        changed = differences(as_json(read_config(folder)), new)
        if changed:
            raise CheckpointError(
                f"{folder} was started with another configuration:\n  " + "\n  ".join(changed) + "\n"
                "Continue with the old values, or start in another --workdir "
                f"(with --config.init_from={folder} to take its parameters along)."
            )
    elif jax.process_index() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part")
        part.write_text(json.dumps(new, indent=2) + "\n")
        part.rename(path)


class Checkpoints:
    """Saves and restores a `TrainState`: asynchronous, atomic, sharded, the last and the best ones kept."""

    def __init__(
        self, folder: Path, keep_last: int, keep_best: int, *, ranks: str = "accuracy", read_only: bool = False
    ) -> None:
        """
        Args:
          ranks: evaluation metric that ranks checkpoints (higher is better).
        """
        self.folder = folder
        policies = [keep.LatestN(keep_last)]
        if keep_best:
            best = keep.BestN(get_metric_fn=lambda metrics: metrics[ranks], n=keep_best, keep_checkpoints_without_metrics=False)
            policies.append(best)
        options = ocp.CheckpointManagerOptions(
            preservation_policy=keep.AnyPreservationPolicy(policies),
            read_only=read_only,
            create=not read_only,
            cleanup_tmp_directories=not read_only,  # of a run that was killed while it saved
            step_prefix=None,
        )
        self.options = options
        self._open()

    def _open(self) -> None:
        handlers = {"state": ocp.StandardCheckpointHandler(), "meta": ocp.JsonCheckpointHandler()}
        path = (self.folder / "checkpoints").absolute()
        self.manager = ocp.CheckpointManager(path, options=self.options, item_handlers=handlers)

    @property
    def steps(self) -> list[int]:
        return sorted(self.manager.all_steps())

    def save(self, state: TrainState, step: int, metrics: dict[str, float] | None = None) -> None:
        """Starts to write the state; training goes on meanwhile. `metrics` are of an evaluation, and rank the best ones."""
        meta = {"position": step, "fingerprint": int(jax.jit(fingerprint)(state))}
        items = ocp.args.Composite(state=ocp.args.StandardSave(state), meta=ocp.args.JsonSave(meta))
        self.manager.save(step, args=items, metrics=metrics)

    def restore(self, trainer: Trainer) -> tuple[TrainState, int] | None:
        """The newest readable checkpoint on the trainer's mesh, and the place in the data. None: there is none.

        A damaged one is named in the log and moved to `damaged/`, and the one before it is used.

        Raises:
          CheckpointError: there are checkpoints, and all of them are damaged.
        """
        steps = self.steps
        for step in reversed(steps):
            try:
                return self._restore(trainer, step)
            except Exception as error:  # Orbax, TensorStore and JSON each raise their own
                _log_damaged(self.folder, step, error)
                self._set_aside(step)
        if steps:
            raise CheckpointError(f"all {len(steps)} checkpoints of {self.folder} are damaged; they are now in damaged/")
        return None

    def _restore(self, trainer: Trainer, step: int) -> tuple[TrainState, int]:
        place = lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
        target = jax.tree.map(place, trainer.abstract_state, trainer.shardings)
        items = ocp.args.Composite(state=ocp.args.StandardRestore(target), meta=ocp.args.JsonRestore())
        restored = self.manager.restore(step, args=items)
        if int(jax.jit(fingerprint)(restored.state)) != restored.meta["fingerprint"]:
            raise CheckpointError("its arrays are not those that were saved")
        return restored.state, restored.meta["position"]

    def _set_aside(self, step: int) -> None:
        self.manager.close()
        if jax.process_index() == 0:
            aside = self.folder / "damaged"
            aside.mkdir(exist_ok=True)
            target = aside / str(step)
            number = 1
            while target.exists():
                target, number = aside / f"{step}.{number}", number + 1
            (self.folder / "checkpoints" / str(step)).rename(target)
        if jax.process_count() > 1:
            from jax.experimental import multihost_utils

            multihost_utils.sync_global_devices("set aside")
        self._open()

    def wait(self) -> None:
        """Until what was saved is on disk."""
        self.manager.wait_until_finished()

    def close(self) -> None:
        self.manager.close()


@dataclasses.dataclass(frozen=True)
class LoadedRun:
    config: RunConfig
    params: Any  # nested dicts, sharded over the mesh
    step: int


def load_run(folder: str | Path, mesh: Mesh, *, dtype: Any = None, step: int | None = None) -> LoadedRun:
    """The parameters of a run, for inference or as a start.

    Args:
      dtype: to hold them in; None: as they were saved.
      step: which checkpoint; None: the newest readable one.

    Raises:
      CheckpointError: no run, no checkpoint, or none that can be read.
    """
    folder = Path(folder).expanduser()
    config = read_config(folder)
    checkpoints = Checkpoints(folder, keep_last=1, keep_best=0, read_only=True)
    try:
        steps = checkpoints.steps
        if step is not None and step not in steps:
            raise CheckpointError(f"{folder} has no checkpoint of step {step}; it has {steps}")
        for candidate in [step] if step is not None else reversed(steps):
            try:
                params = _params_of(checkpoints, config, mesh, candidate)
            except Exception as error:
                _log_damaged(folder, candidate, error)
                continue
            if dtype is not None:
                params = jax.jit(lambda tree: jax.tree.map(lambda p: p.astype(dtype), tree))(params)
            return LoadedRun(config, params, candidate)
        raise CheckpointError(f"no checkpoint at {folder}: " + ("all are damaged" if steps else "none was saved yet"))
    finally:
        checkpoints.close()


def _log_damaged(folder: Path, step: int, error: Exception) -> None:
    logging.error("checkpoint %s is damaged (%s)", folder / "checkpoints" / str(step), first_line(error)[:300])


def _params_of(checkpoints: Checkpoints, config: RunConfig, mesh: Mesh, step: int) -> Any:
    model = module_of(config.model)(config.model)
    blueprint = Blueprint.of(model, config.optimizer.rules, mesh)
    # The optimizer's moments are left on disk: `partial_restore` reads what the target names.
    target = dict(zip(("trained", "frozen"), split(blueprint.abstract, blueprint.rules), strict=True))
    path = checkpoints.folder.absolute() / "checkpoints" / str(step) / "state"
    restore_args = ocp.checkpoint_utils.construct_restore_args(target)
    args = ocp.args.PyTreeRestore(item=target, restore_args=restore_args, partial_restore=True)
    with ocp.PyTreeCheckpointer() as checkpointer:
        restored = checkpointer.restore(path, args=args)
    return merge(restored["trained"], restored["frozen"])
