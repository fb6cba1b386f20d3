"""The state of a run, how it is made on the mesh, and one update of it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from vlm_jax.batch import Batch, micro_batches
from vlm_jax.config import RunConfig
from vlm_jax.config.register import module_of
from vlm_jax.data.rows import empty_rows
from vlm_jax.paths import Params, by_path, nested
from vlm_jax.runtime import compute_dtype
from vlm_jax.sharding import batch_sharding, batch_shards, initial_params
from vlm_jax.training.adapters import with_dropout
from vlm_jax.training.objective import OBJECTIVES, Objective, in_set
from vlm_jax.training.optimizer import make_optimizer, schedule
from vlm_jax.training.params import Blueprint, merge, split, trained_rows

Array = jax.Array
# Of one update: a batch; where several sets are accumulated, that of each, None of those that are not in this update.
Batches = Batch | tuple[Batch | None, ...]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Everything a checkpoint keeps, but for the place in the data, which is `step`."""

    step: Array  # [] int32, updates done or skipped
    trained: Params
    frozen: Params
    opt_state: Any
    skipped: Array  # [] int32, updates left out because the loss or a gradient was not finite
    skipped_in_a_row: Array  # [] int32
    # Frozen copies of parameters as they were at the beginning, for an objective that compares with them (`Objective`).
    reference: Params = dataclasses.field(default_factory=dict)

    @property
    def params(self) -> Params:
        return merge(self.trained, self.frozen)


def zeros_batch(config: RunConfig, rows: int) -> Batch:
    """A batch of the run's shapes with nothing in it."""
    features = config.model.cached_features if config.data.cache_features else None
    return Batch(**jax.tree.map(jnp.asarray, empty_rows(config.data, rows, features=features)))


def taken_sets(config: RunConfig) -> list[tuple[bool, ...]]:
    """Which sets an update takes: of each update until they repeat."""
    every = [one.every for one in config.data_sets]
    if config.sets == "round_robin":
        return [tuple(number == turn for number in range(len(every))) for turn in range(len(every))]
    return [tuple(step % one == 0 for one in every) for step in range(math.lcm(*every))]


def update_batches(config: RunConfig) -> list[Batches]:
    """Batches with nothing in them, of each update until their kinds repeat (`taken_sets`)."""
    made = tuple(zeros_batch(dataclasses.replace(config, data=one.data), one.data.rows) for one in config.data_sets)
    if len(made) == 1:
        return [made[0]]
    return [
        tuple(batch if is_taken else None for batch, is_taken in zip(made, taken, strict=True)) for taken in taken_sets(config)
    ]


class Trainer:
    """A run's model, objective, optimizer and mesh, and the compiled functions `train_step`, `eval_step` and `cached_features`.

    Every method must be called within `jax.set_mesh(trainer.mesh)`. What needs no array, `train_step.lower` among it, works
    for a mesh of devices that are not there.
    """

    def __init__(self, config: RunConfig, mesh: Mesh) -> None:
        shards = batch_shards(mesh)
        accumulate = config.optimizer.accumulate
        for one in config.data_sets:
            if one.data.rows % (shards * accumulate):
                where = f"config.accumulated.{one.name}.data" if one.name else "config.data"
                raise ValueError(
                    f"{where}.rows={one.data.rows} does not divide into data*fsdp={shards} shares of "
                    f"accumulate={accumulate} micro-batches"
                )
        self.config, self.mesh = config, mesh
        self.model = module_of(config.model)(config.model, compute_dtype(config.dtype), config.remat)
        self.objective: Objective = OBJECTIVES[type(config.objective)](config.objective)
        self.blueprint = Blueprint.of(self.model, config.optimizer.rules, mesh, config.adapters)
        self.rules = self.blueprint.rules
        self.optimizer = make_optimizer(config.optimizer, self.rules, config.steps)
        self.schedule = schedule(config.optimizer, config.steps)
        initial = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.float32), self.blueprint.without_held)
        self.abstract_state = jax.eval_shape(self._state_of, initial)
        self.shardings = self._shardings()
        self.batch_sharding = batch_sharding(mesh)
        replicated = NamedSharding(mesh, PartitionSpec())
        self.train_step = jax.jit(
            self._train_step,
            donate_argnums=0,
            in_shardings=(self.shardings, self.batch_sharding),
            out_shardings=(self.shardings, replicated),
        )
        images_of = lambda params, images: self.model.apply({"params": params}, images, method="cached_features")
        self.cached_features = jax.jit(images_of, out_shardings=replicated)
        self.eval_step = jax.jit(self._eval_step, in_shardings=(self.shardings, self.batch_sharding), out_shardings=replicated)

    def init(self) -> TrainState:
        """A fresh state, every array made in its shards."""
        return self.state_of(nested(self.initial_params()))

    def initial_params(self, *, without: Collection[str] = ()) -> dict[str, Array]:
        """Untrained parameters of the model by path, but for those whose paths are in `without`."""
        return initial_params(self.model, jax.random.key(self.config.seed), mesh=self.mesh, without=without)

    def state_of(self, params: Params) -> TrainState:
        """A fresh state around given parameters (of another run, or converted)."""
        return jax.jit(self._state_of, out_shardings=self.shardings)(params)

    def put(self, batch: Batches) -> Batches:
        """This process's rows -> its shards of the global batch or batches."""
        return jax.tree.map(lambda x: jax.make_array_from_process_local_data(self.batch_sharding, x), batch)

    def _state_of(self, params: Params) -> TrainState:
        params = self.blueprint.hold(params, jax.random.key(self.config.seed))
        trained, frozen = split(params, self.rules)
        zero = jnp.zeros((), jnp.int32)
        return TrainState(zero, trained, frozen, self.optimizer.init(trained), zero, zero, self.objective.reference_of(trained))

    def _shardings(self) -> TrainState:
        trained, frozen = split(self.blueprint.shardings, self.rules)
        replicated = NamedSharding(self.mesh, PartitionSpec())
        opt_state = _like_parameters(self.abstract_state.opt_state, by_path(trained), otherwise=replicated)
        reference = _like_parameters(self.abstract_state.reference, by_path(trained), otherwise=replicated)
        return TrainState(replicated, trained, frozen, opt_state, replicated, replicated, reference)

    def gradients(
        self,
        trained: Params,
        frozen: Params,
        batch: Batch,
        *,
        key: Array | None = None,
        reference: Params | None = None,
        recompute: bool = True,
    ) -> tuple[dict[str, Array], Params]:
        """Sums over the batch, and the gradient of the mean loss, in `accumulate` micro-batches.

        Args:
          key: of the dropout of adapters; None: without dropout.
          reference: of the state.
          recompute: False: without rematerialisation, to count the mathematics alone.
        """
        weight = self.objective.weight(batch)
        model = self.model if recompute else self.model.clone(remat="none")
        micro = self.config.optimizer.accumulate
        options: dict[str, Any] = {"reference": reference} if reference else {}
        if self.objective.whole_batch:
            options, micro = options | {"micro": micro}, 1

        def loss(trained: Params, part: Batch, number: Array | int = 0) -> tuple[Array, dict[str, Array]]:
            params = merge(trained, frozen)
            if key is not None and self.config.adapters:
                params = with_dropout(params, self.config.adapters, jax.random.fold_in(key, number))
            sums = self.objective.sums(model, params, part, recompute=recompute, **options)
            # Divided here, by the whole batch's weight: dividing the gradients would read and write them all once more.
            return sums["loss"] / weight, sums

        grad = jax.grad(loss, has_aux=True)
        if micro == 1:
            gradients, sums = grad(trained, batch)
            return sums, gradients

        def add(total: Params, numbered: tuple[Batch, Array]) -> tuple[Params, dict[str, Array]]:
            gradients, sums = grad(trained, *numbered)
            return jax.tree.map(jnp.add, total, gradients), sums

        zeros = jax.tree.map(jnp.zeros_like, trained)
        gradients, sums = jax.lax.scan(add, zeros, (micro_batches(batch, micro), jnp.arange(micro)))
        sums = jax.tree.map(lambda each: each.sum(axis=0), sums)
        return sums, gradients

    def gradients_of_sets(
        self, trained: Params, frozen: Params, batches: Batches, *, key: Array | None = None, **options: Any
    ) -> tuple[dict[str, dict[str, Array]], Params]:
        """Of one update: the sums of each set by its name, and the gradient of the weighted sum of their mean losses.

        Flamingo (Alayrac et al. 2022, section 2.4): sum_m lambda_m * loss_m, each over its own batch.

        Args:
          key, options: of `gradients`; each set has a dropout of its own.
        """
        if not isinstance(batches, tuple):
            sums, gradients = self.gradients(trained, frozen, batches, key=key, **options)
            return {"": sums}, gradients
        sums, total = {}, None
        for number, (one, batch) in enumerate(zip(self.config.data_sets, batches, strict=True)):
            if batch is None:
                continue
            if total is not None:
                # One set after the other, so that the activations of one are in memory at a time.
                total, batch = jax.lax.optimization_barrier((total, batch))
            own = None if key is None else jax.random.fold_in(key, number)
            sums[one.name], gradients = self.gradients(trained, frozen, batch, key=own, **options)
            weighted = jax.tree.map(lambda leaf, weight=one.weight: weight * leaf, gradients)
            total = weighted if total is None else jax.tree.map(jnp.add, total, weighted)
        return sums, total

    def _means(self, sums: dict[str, dict[str, Array]]) -> dict[str, Array]:
        """The metrics of each set, as `NAME/METRIC`, and those of `config.data` without a name."""
        means = {name: self.objective.means(of_set) for name, of_set in sums.items()}
        metrics = {in_set(name, key): value for name, of in means.items() for key, value in of.items()}
        if self.config.accumulated:
            metrics["weighted_loss"] = sum(
                one.weight * means[one.name]["loss"] for one in self.config.data_sets if one.name in means
            )
        return metrics

    def _train_step(self, state: TrainState, batch: Batches) -> tuple[TrainState, dict[str, Array]]:
        key = jax.random.fold_in(jax.random.key(self.config.seed), state.step)
        sums, gradients = self.gradients_of_sets(state.trained, state.frozen, batch, key=key, reference=state.reference)
        norm = optax.global_norm(trained_rows(gradients, self.rules))
        updates, opt_state = self.optimizer.update(gradients, state.opt_state, state.trained)
        updated = self.objective.bound(optax.apply_updates(state.trained, updates))
        losses = sum(of_set["loss"] for of_set in sums.values())
        finite = jnp.isfinite(norm) & jnp.isfinite(losses)
        choose = lambda new, old: jax.tree.map(lambda n, o: jnp.where(finite, n, o), new, old)
        bad = (~finite).astype(jnp.int32)
        new = TrainState(
            step=state.step + 1,
            trained=choose(updated, state.trained),
            frozen=state.frozen,
            opt_state=choose(opt_state, state.opt_state),
            skipped=state.skipped + bad,
            skipped_in_a_row=(state.skipped_in_a_row + 1) * bad,
            reference=state.reference,
        )
        updates_done = state.step - state.skipped
        metrics = self._means(sums) | {
            "gradient_norm": norm,
            "lr": self.schedule(updates_done),
            "skipped": new.skipped,
            "skipped_in_a_row": new.skipped_in_a_row,
        }
        return new, metrics

    def _eval_step(self, state: TrainState, batch: Batch) -> dict[str, Array]:
        compared = {"reference": state.reference} if state.reference else {}
        return self.objective.sums(self.model, state.params, batch, **compared)


def _like_parameters(state: Any, of_params: dict[str, Any], *, otherwise: Any) -> Any:
    """The optimizer's state with, in the place of each leaf, what its parameter has; of what belongs to none, `otherwise`.

    A leaf belongs to the parameter whose path its own ends with: `1/mu/language/embedding`.
    """

    def of(path: tuple[Any, ...], leaf: Any) -> Any:
        names = [str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in path]
        ends = ("/".join(names[start:]) for start in range(len(names)))
        return next((of_params[end] for end in ends if end in of_params), otherwise)

    return jax.tree_util.tree_map_with_path(of, state)
