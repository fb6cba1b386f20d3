"""A run from its first step, or from its newest checkpoint, to its last."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import signal
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

from vlm_jax.config import RunConfig
from vlm_jax.data.pipeline import eval_batches
from vlm_jax.progress import human_rate, human_time
from vlm_jax.sharding import make_mesh
from vlm_jax.training.checkpoint import Checkpoints
from vlm_jax.training.evaluator import Evaluators, RunParts
from vlm_jax.training.features import check_cacheable
from vlm_jax.training.flops import count_flops, peak_flops
from vlm_jax.training.initial import first_state
from vlm_jax.training.interrupt import Interrupt
from vlm_jax.training.objective import by_set, in_set
from vlm_jax.training.report import Reporter, StepTimer, logged
from vlm_jax.training.run_folder import LOG, seal, write_or_check_config, writing
from vlm_jax.training.sets import DataSet, HeldOut, check_sets, open_sets, train_batches, with_features
from vlm_jax.training.step import Trainer, TrainState, update_batches
from vlm_jax.training.table import print_table


class NonFiniteLoss(FloatingPointError):
    """Too many updates in a row were skipped."""


@dataclasses.dataclass(frozen=True)
class Result:
    """How a run ended."""

    step: int
    metrics: dict[str, float]  # of the last whole evaluations; empty if it was interrupted before them
    signal: int | None  # the signal that ended it early


def train(config: RunConfig, workdir: str | Path) -> Result:
    """Trains until `config.steps`, resuming from the newest checkpoint in `workdir`.

    Raises:
      ValueError: the data does not lay pictures out as the model reads them.
      CheckpointError: `workdir` belongs to another configuration, other data or another train.py that still runs, cannot be
        written, or all its checkpoints are damaged.
      Interrupted: a signal before the first step.
      NonFiniteLoss: more than `config.optimizer.max_bad_steps` updates in a row were not finite.
    """
    folder = Path(workdir).expanduser()
    with Interrupt() as interrupt, writing(folder), logged(folder / LOG):
        return _train(config, folder, interrupt)


def _train(config: RunConfig, folder: Path, interrupt: Interrupt) -> Result:
    check_sets(config)
    write_or_check_config(folder, config)
    sets = open_sets(config, folder)  # their errors are found before the model is made
    own = sets[0]
    mesh = make_mesh(config.mesh)
    with jax.set_mesh(mesh):
        trainer = Trainer(config, mesh)
        if jax.process_index() == 0:
            print_table(trainer)
        evaluators = Evaluators(
            RunParts(config=config, trainer=trainer, processor=own.processor, source=own.source, held_out=own.held_out)
        )
        ranks = config.best_by or trainer.objective.checkpoint_metric
        if any(one.data.cache_features for one in config.data_sets):
            check_cacheable(trainer)
        data = {name: store.meta["content"] for one in sets for name, store in one.stores.items()}
        checkpoints = Checkpoints(folder, config.keep_last, config.keep_best, ranks=ranks, data=data)
        state, start = first_state(trainer, checkpoints, folder)
        seal(folder)
        sets = [with_features(one, trainer, state) if one.config.data.cache_features else one for one in sets]
        reporter = Reporter(folder, start, config=config)
        run = _Run(
            config=config,
            trainer=trainer,
            evaluators=evaluators,
            checkpoints=checkpoints,
            reporter=reporter,
            interrupt=interrupt,
            sets=sets,
        )
        try:
            return run.go(state, start)
        finally:
            # All that counts was written before, or its error is on its way.
            for part in (reporter, checkpoints):
                with contextlib.suppress(Exception):
                    part.close()


def _this_process() -> dict[str, int]:
    return {"process_index": jax.process_index(), "process_count": jax.process_count()}


@dataclasses.dataclass(kw_only=True)
class _Run:
    config: RunConfig
    trainer: Trainer
    evaluators: Evaluators
    checkpoints: Checkpoints
    reporter: Reporter
    interrupt: Interrupt
    sets: list[DataSet]  # the first is `config.data`
    pending: list[Any] = dataclasses.field(default_factory=list)  # metrics still on the device, a step each
    lap: list[dict[str, float]] = dataclasses.field(default_factory=list)  # those since the last progress line

    def go(self, state: TrainState, start: int) -> Result:
        config = self.config
        flops, update = self._compile(state)
        done = f"resuming at step {start}" if start else "starting"
        todo = f"{config.steps - start} steps to go"
        self.reporter.say(f"{done}, {todo}; Ctrl-C saves and exits; run the same command again to resume")
        data = train_batches(config, self.sets, start=start, **_this_process())
        self.interrupt.defer_signals()
        timer, metrics, step, saved = StepTimer(), {}, start, start
        try:
            for batch in data:
                state, stepped = update(state, self.trainer.put(batch))
                del batch  # on a CPU the device arrays may be a worker's memory: the last must not outlive the loop
                step += 1
                self.pending.append(stepped)
                last, logs = step == config.steps, step % config.log_every == 0
                if last or logs:
                    self._flush(step)
                    self._log(step, timer.elapsed(), flops, left_out=self._of_all(data.left_out))
                with timer.pause():
                    metrics = {}
                    if last or step % config.eval_every == 0:
                        metrics = self.evaluate(state, step, whole=last)
                    metrics |= self.evaluators.evaluate(state, step, last=last, reporter=self.reporter)
                    if last or step % config.save_every == 0:
                        self._save(state, step, metrics)
                        saved = step
                    if not last and self.interrupt.should_stop(agree=logs):
                        break
        finally:
            data.close()
        if step < config.steps and saved != step:
            self._save(state, step, {})
        self.checkpoints.wait()
        if step < config.steps:
            name = signal.Signals(self.interrupt.signal).name
            self.reporter.say(f"{name}: saved step {step} of {config.steps}; run the same command again to resume")
        return Result(step, metrics, self.interrupt.signal if step < config.steps else None)

    def _compile(self, state: TrainState) -> tuple[int, Any]:
        """Model FLOPs of an update, and the update compiled, so that the first progress line already has the speed."""
        began = time.perf_counter()
        trainer = self.trainer
        of_steps = jax.eval_shape(lambda: update_batches(self.config))
        kinds = {jax.tree.structure(batch): batch for batch in of_steps}
        # The mathematics alone is counted: rematerialisation is work, but not the model's.
        count = functools.partial(trainer.gradients_of_sets, reference=state.reference, recompute=False)
        of_kinds = {kind: count_flops(count, state.trained, state.frozen, batch) for kind, batch in kinds.items()}
        flops = sum(of_kinds[jax.tree.structure(batch)] for batch in of_steps) // len(of_steps)
        updates = {kind: trainer.train_step.lower(state, batch).compile() for kind, batch in kinds.items()}
        self.reporter.say(f"{human_rate(flops, 'FLOP')} a step; compiled in {human_time(time.perf_counter() - began)}")
        return flops, lambda state, batch: updates[jax.tree.structure(batch)](state, batch)

    def _of_all(self, number: int) -> int:
        """Summed over the processes, where any may have some."""
        if jax.process_count() == 1 or all(one.data.source.bad_lines == "error" for one in self.config.data_sets):
            return number
        from jax.experimental import multihost_utils

        return int(multihost_utils.process_allgather(np.int32(number)).sum())

    def _save(self, state: TrainState, step: int, metrics: dict[str, float]) -> None:
        # The lines of what a checkpoint holds must be on disk before it: a resumed run writes only those after it.
        self._flush(step)
        self.checkpoints.save(state, step, metrics or None)

    def evaluate(self, state: TrainState, step: int, *, whole: bool) -> dict[str, float]:
        """Means over the held-out split of each set and of each member of a mixture, or over its first `eval_rows` rows."""
        began = time.perf_counter()
        rows = 0 if whole else self.config.eval_rows
        metrics: dict[str, float] = {}
        for one in self.sets:
            found = {name: self._sums(state, one, part, rows) for name, part in one.held_out_parts.items()}
            if len(found) > 1:
                total = {name: sum(of[name] for of in found.values()) for name in next(iter(found.values()))}
                found = {one.name: total} | found
            for name, sums in found.items():
                means = self.trainer.objective.means({key: np.float64(total) for key, total in sums.items()})
                metrics |= {in_set(name, key): float(value) for key, value in means.items()}
        self.reporter.record(step, metrics, "eval_")
        self.reporter.plot(step, {f"eval/{name}": value for name, value in metrics.items()})
        self.reporter.flush()
        blank = " (every picture blanked)" if self.config.data.blank_images else ""
        took = human_time(time.perf_counter() - began)
        for name, of_set in by_set(metrics).items():
            line = self.trainer.objective.evaluation_line(of_set)
            self.reporter.say(f"step {step}: {f'{name}: ' if name else ''}{line}{blank}, in {took}")
        return metrics

    def _sums(self, state: TrainState, one: DataSet, part: HeldOut, rows: int) -> dict[str, float]:
        totals: dict[str, float] = {}
        options = dict(max_rows=rows, features=part.features, **_this_process())
        for batch in eval_batches(one.config.data, one.processor, part.source, **options):
            for name, value in jax.device_get(self.trainer.eval_step(state, self.trainer.put(batch))).items():
                totals[name] = totals.get(name, 0.0) + float(value)
        return totals

    def _flush(self, step: int) -> None:
        """Waits for the device, and writes a line for each step since the last time.

        Raises:
          NonFiniteLoss: too many updates in a row were skipped.
        """
        values = [{name: float(value) for name, value in one.items()} for one in jax.device_get(self.pending)]
        self.pending = []
        self.lap += values
        for number, value in enumerate(values, step - len(values) + 1):
            self.reporter.record(number, value)
            if value["skipped_in_a_row"] > self.config.optimizer.max_bad_steps:
                self.reporter.flush()
                raise NonFiniteLoss(
                    f"step {number}: loss or gradient not finite for {value['skipped_in_a_row']:.0f} steps in a row; the last "
                    "checkpoint is from before. Lower --config.optimizer.lr, lengthen the warm-up, or look at the data"
                )
        self.reporter.flush()

    def _log(self, step: int, seconds: float, flops: int, *, left_out: int) -> None:
        """The progress line of the steps since the last one."""
        mesh, config, last, steps = self.trainer.mesh, self.config, self.lap[-1], len(self.lap)
        objective = self.trainer.objective
        # Of a set that was not in every update, over those that it was in.
        taken = {
            name: [value[name] for value in self.lap if name in value]
            for name in dict.fromkeys(key for of in self.lap for key in of)
        }
        mean = {name: sum(values) / len(values) for name, values in taken.items()}
        self.lap = []
        of_sets = {name: of for name, of in by_set(mean).items() if objective.examples_metric in of}
        seen = sum(sum(values) for name, values in taken.items() if name.rpartition("/")[2] == objective.examples_metric)
        examples, rate = seen / seconds, flops * steps / seconds
        peak = peak_flops(mesh.devices.flat[0])
        share = f" ({rate / (peak * mesh.size):.1%} of peak)" if peak else ""
        skipped = f"  skipped {last['skipped']:.0f}" if last["skipped"] else ""
        skipped += f"  examples left out {left_out}" if left_out else ""
        line = "  ".join(f"{f'{name}: ' if name else ''}{objective.training_line(of)}" for name, of in of_sets.items())
        self.reporter.say(
            f"step {step:>{len(str(config.steps))}}/{config.steps}  {line}  "
            f"{human_rate(examples, ' examples/s')}  {human_rate(rate, 'FLOP/s')}{share}{skipped}  "
            f"left {human_time((config.steps - step) * seconds / steps)}"
        )
        shown = mean | {name: last[name] for name in ("lr", "skipped", "skipped_in_a_row")}
        self.reporter.plot(step, {f"train/{name}": value for name, value in shown.items()})
        self.reporter.plot(step, {"speed/examples": examples, "speed/flops": rate, "speed/step": seconds / steps})
