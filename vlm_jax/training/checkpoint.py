"""The checkpoints of a run: saved, restored onto any mesh, checked."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import logging
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from absl import logging as absl_logging
from jax.sharding import Mesh
from orbax.checkpoint.checkpoint_managers import preservation_policy as keep

from vlm_jax.config import RunConfig
from vlm_jax.config.register import module_of
from vlm_jax.errors import first_line
from vlm_jax.layers.lora import cast
from vlm_jax.training.params import Blueprint, merge, split
from vlm_jax.training.peers import BROKEN
from vlm_jax.training.run_folder import LOG, CheckpointError, read_config
from vlm_jax.training.step import Trainer, TrainState

log = logging.getLogger(__name__)

# Errors that say nothing about a checkpoint: of the system, and of JAX and its collectives.
PASSING = (errno.ENOMEM, errno.EIO, errno.EMFILE, errno.ENFILE, errno.EACCES, errno.EPERM, errno.ESTALE, errno.ETIMEDOUT)
STATUSES = (*BROKEN, "RESOURCE_EXHAUSTED", "PERMISSION_DENIED", "CANCELLED")


def fingerprint(tree: Any) -> jax.Array:
    """[] uint32, the wrapping sum of all bits: exact, and the same for every sharding. A flipped bit changes it."""
    words = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint32}

    def of(leaf: jax.Array) -> jax.Array:
        bits = jax.lax.bitcast_convert_type(leaf, words[leaf.dtype.itemsize])
        return jnp.sum(bits, dtype=jnp.uint32)

    # Weighted by its place, so that two leaves of the same shape cannot be exchanged unseen.
    leaves = enumerate(jax.tree.leaves(tree))
    return jnp.sum(jnp.stack([of(leaf) * jnp.uint32(2 * i + 1) for i, leaf in leaves]), dtype=jnp.uint32)


@jax.jit
def _fingerprints(state: TrainState) -> dict[str, jax.Array]:
    """Of the whole state, and of the parameters alone; what both need is computed once."""
    return {"fingerprint": fingerprint(state), "params": fingerprint((state.trained, state.frozen))}


def _kept(state: TrainState) -> dict[str, Any]:
    """By name, without an empty `reference`: most runs have none, nor have checkpoints from before there was one."""
    fields = {field.name: getattr(state, field.name) for field in dataclasses.fields(state)}
    return {name: value for name, value in fields.items() if name != "reference" or value}


@contextlib.contextmanager
def _without_warnings() -> Iterator[None]:
    """Orbax warns that a folder which is opened for reading is for reading."""
    before = absl_logging.get_verbosity()
    absl_logging.set_verbosity(absl_logging.ERROR)
    try:
        yield
    finally:
        absl_logging.set_verbosity(before)


class Checkpoints:
    """Saves and restores a `TrainState`: asynchronous, atomic, sharded, the last and the best ones kept."""

    def __init__(
        self,
        folder: Path,
        keep_last: int,
        keep_best: int,
        *,
        ranks: str = "accuracy",
        data: dict[str, int] | None = None,
        read_only: bool = False,
    ) -> None:
        """
        Args:
          ranks: evaluation metric that ranks checkpoints; the highest is best, with "-" in front the lowest.
          data: checksums of the data sets by name, kept in every checkpoint.
        """
        self.folder, self.data, self.ranks = folder, data or {}, ranks.removeprefix("-")
        policies = [keep.LatestN(keep_last)]
        if keep_best:
            # A checkpoint of before the run was resumed with another `ranks` may lack it.
            name, worst = ranks.removeprefix("-"), math.inf if ranks.startswith("-") else -math.inf
            rank = lambda metrics: worst if metrics.get(name) is None else metrics[name]
            of = dict(get_metric_fn=rank, reverse=worst > 0, n=keep_best, keep_checkpoints_without_metrics=False)
            policies.append(keep.BestN(**of))
        options = ocp.CheckpointManagerOptions(
            preservation_policy=keep.AnyPreservationPolicy(policies),
            read_only=read_only,
            save_interval_steps=0 if read_only else 1,
            create=not read_only,
            cleanup_tmp_directories=not read_only,  # of a run that was killed while it saved
            step_prefix=None,
        )
        self.options = options
        self._open()

    def _open(self) -> None:
        handlers = {"state": ocp.StandardCheckpointHandler(), "meta": ocp.JsonCheckpointHandler()}
        path = (self.folder / "checkpoints").absolute()
        with _without_warnings() if self.options.read_only else contextlib.nullcontext():
            self.manager = ocp.CheckpointManager(path, options=self.options, item_handlers=handlers)

    @property
    def steps(self) -> list[int]:
        return sorted(self.manager.all_steps())

    def save(self, state: TrainState, step: int, metrics: dict[str, float] | None = None) -> None:
        """Starts to write the state; training goes on meanwhile. `metrics` are of its evaluations, and rank the best ones.

        Raises:
          CheckpointError: this one or the one before it cannot be written.
        """
        found = jax.tree.map(int, _fingerprints(state))
        meta = {"position": step, "data": self.data, **found}
        items = ocp.args.Composite(state=ocp.args.StandardSave(_kept(state)), meta=ocp.args.JsonSave(meta))
        with self._writes():
            self.manager.save(step, args=items, metrics=metrics if self.ranks in (metrics or {}) else None)

    def restore(self, trainer: Trainer) -> tuple[TrainState, int] | None:
        """The newest readable checkpoint on the trainer's mesh, and the place in the data. None: there is none.

        A damaged one is named in the log and moved to `damaged/`, and the one before it is used.

        Raises:
          CheckpointError: all are damaged, one cannot be read for another reason, or it was trained on other data. Where
            several processes train together, the first damaged one: each may have met another part of it.
        """
        for step in reversed(self.steps):
            try:
                restored = self._restore(trainer, step)
            except Exception as error:  # Orbax, TensorStore and JSON each raise their own
                _check_damaged(self.folder, step, error)
                restored = None
            # Outside of the above: what fails in a collective is no damage.
            if restored is not None and self._is_intact(restored, step):
                self._check_data(trainer.config, restored.meta)
                return restored.state, step
            self._set_aside(step)
        aside = self.folder / "damaged"
        if aside.is_dir() and any(aside.iterdir()):
            raise CheckpointError(
                f"all checkpoints of {self.folder} are damaged; they are in {aside}. Restore one into "
                f"{self.folder / 'checkpoints'} from a copy; or start over in another --workdir; or, to start over here, "
                f"remove {aside}"
            )
        return None

    def _check_data(self, config: RunConfig, meta: dict[str, Any]) -> None:
        before = meta.get("data", {})
        changed = [name for name, checksum in self.data.items() if before.get(name, checksum) != checksum]
        if not changed:
            return
        names = " and ".join(changed)
        what = f"the data of {names} are not those that {self.folder} was trained on until step {meta['position']}"
        if not config.accept_changed_data:
            raise CheckpointError(f"{what}: bring those back, or go on with --config.accept_changed_data=True")
        log.warning("%s; going on, as config.accept_changed_data says", what)

    @contextlib.contextmanager
    def _writes(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # Orbax and TensorStore each raise their own, some from the thread that writes
            log.exception("a checkpoint of %s cannot be written", self.folder)
            raise CheckpointError(
                f"a checkpoint cannot be written into {self.folder} ({first_line(error)[:200]}); {self.folder / LOG} has the "
                "details. Mend the cause and run the same command again to resume"
            ) from error

    def _is_intact(self, restored: Any, step: int) -> bool:
        found = int(jax.jit(fingerprint)(restored.state))
        intact = found == restored.meta.get("fingerprint") and restored.meta.get("position") == step
        if not intact:
            _log_damaged(self.folder, step, "its arrays are not those that were saved")
        return intact

    def _restore(self, trainer: Trainer, step: int) -> Any:
        place = lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
        target = jax.tree.map(place, trainer.abstract_state, trainer.shardings)
        items = ocp.args.Composite(state=ocp.args.StandardRestore(_kept(target)), meta=ocp.args.JsonRestore())
        restored = self.manager.restore(step, args=items)
        return ocp.args.Composite(state=TrainState(**restored.state), meta=restored.meta)

    def _set_aside(self, step: int) -> None:
        alone = jax.process_count() == 1
        if alone:
            self.manager.close()
        with contextlib.suppress(FileNotFoundError):  # another process of the run was first
            aside = self.folder / "damaged"
            aside.mkdir(exist_ok=True)
            target = aside / str(step)
            number = 1
            while target.exists():
                target, number = aside / f"{step}.{number}", number + 1
            (self.folder / "checkpoints" / str(step)).rename(target)
        if not alone:
            raise CheckpointError(f"checkpoint {step} is now in {aside}: run the same command again")
        self._open()

    def wait(self) -> None:
        """Until what was saved is on disk; raises as `save`."""
        with self._writes():
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
      dtype: to hold them in, but int8 kernels and scales; None: as they were saved.
      step: which checkpoint; None: the newest readable one.

    Raises:
      CheckpointError: no run, no checkpoint, or none that can be read; ChecksumError: a damaged file beside them.
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
                params, expected = _params_of(checkpoints, config, mesh, candidate)
            except Exception as error:
                _check_damaged(folder, candidate, error)
                continue
            if expected is None:
                log.warning("checkpoint %s of %s was written without a fingerprint of its parameters", candidate, folder)
            elif int(jax.jit(fingerprint)(params)) != expected:
                _log_damaged(folder, candidate, "its parameters are not those that were saved")
                continue
            params = merge(*params)
            if dtype is not None:
                params = jax.jit(lambda tree: cast(tree, dtype))(params)
            return LoadedRun(config, params, candidate)
        raise CheckpointError(f"no checkpoint at {folder}: " + ("all are damaged" if steps else "none was saved yet"))
    finally:
        checkpoints.close()


def _log_damaged(folder: Path, step: int, cause: str) -> None:
    log.error("checkpoint %s is damaged (%s)", folder / "checkpoints" / str(step), cause)


def _check_damaged(folder: Path, step: int, error: Exception) -> None:
    """Logs a damaged checkpoint.

    Raises:
      CheckpointError: the error says nothing about the checkpoint: memory ran out, or a disk or the network failed.
    """
    cause = first_line(error)[:300]
    passing = any(words in str(error) for words in (*STATUSES, *map(os.strerror, PASSING)))
    if passing or isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno in PASSING):
        raise CheckpointError(
            f"checkpoint {step} of {folder} cannot be read at the moment ({cause}); it was left where it is: mend the cause "
            "and run the same command again"
        ) from error
    _log_damaged(folder, step, cause)


def _params_of(checkpoints: Checkpoints, config: RunConfig, mesh: Mesh, step: int) -> tuple[tuple[Any, Any], int | None]:
    """The trained and the frozen parameters, and the fingerprint that they were saved with."""
    model = module_of(config.model)(config.model)
    blueprint = Blueprint.of(model, config.optimizer.rules, mesh, config.adapters)
    # The optimizer's moments are left on disk: `partial_restore` reads what the target names.
    target = dict(zip(("trained", "frozen"), split(blueprint.abstract, blueprint.rules), strict=True))
    path = checkpoints.folder.absolute() / "checkpoints" / str(step)
    restore_args = ocp.checkpoint_utils.construct_restore_args(target)
    args = ocp.args.PyTreeRestore(item=target, restore_args=restore_args, partial_restore=True)
    with ocp.PyTreeCheckpointer() as checkpointer:
        restored = checkpointer.restore(path / "state", args=args)
    meta = checkpoints.manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore())).meta
    return (restored["trained"], restored["frozen"]), meta.get("params")
