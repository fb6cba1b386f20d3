"""The state of a run, how it is made on the mesh, and one update of it."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from vlm_jax.batch import Batch
from vlm_jax.config import AugmentConfig, RunConfig
from vlm_jax.config.register import module_of
from vlm_jax.data.rows import empty_rows
from vlm_jax.paths import Params, by_path
from vlm_jax.runtime import compute_dtype
from vlm_jax.sharding import batch_sharding, batch_shards, unboxed
from vlm_jax.training.adapters import with_dropout
from vlm_jax.training.objective import OBJECTIVES, Objective
from vlm_jax.training.optimizer import make_optimizer, schedule
from vlm_jax.training.params import Blueprint, merge, split, trained_rows

Array = jax.Array


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

    @property
    def params(self) -> Params:
        return merge(self.trained, self.frozen)


def zeros_batch(config: RunConfig, rows: int) -> Batch:
    """A batch of the run's shapes with nothing in it."""
    vision = config.model.vision
    features = (vision.frame_features, vision.width) if config.data.cache_features else None
    return Batch(**jax.tree.map(jnp.asarray, empty_rows(config.data, rows, features=features)))


def check_pictures(config: RunConfig) -> None:
    """Checks that the data prepares images as the model reads them.

    Raises:
      ValueError: it does not; the message says what to set.
    """
    model, data = config.model, config.data
    needed = model.visual_tokens_in_sequence
    if data.visual_tokens != needed:
        how = (
            f"has {needed} visual tokens of a tile in the sequence" if needed else "reads pictures by cross-attention, or none"
        )
        raise ValueError(f"config.data.visual_tokens={data.visual_tokens}: the model {how}: set it to {needed}")
    if data.keep_shapes != model.reads_shapes:
        raise ValueError(f"config.data.keep_shapes={data.keep_shapes}: this vision encoder needs {model.reads_shapes}")
    side = model.vision.image_size if needed and not data.keep_shapes else data.image_size
    if needed and (data.image_size, data.frames) != (side, 1):
        raise ValueError(f"visual tokens in the sequence: set config.data.image_size={side} and frames=1")
    if data.processor and (data.augment != AugmentConfig() or data.blank_images):
        raise ValueError("config.data.augment and blank_images are for recipes: config.data.processor makes its own pixels")
    if data.pad_to_square and not data.processor:
        raise ValueError("config.data.pad_to_square is for config.data.processor; a recipe has config.data.image_fit")
    if data.template and not data.processor:
        raise ValueError("config.data.template is for config.data.processor; a recipe has config.data.prompt and answer")


class Trainer:
    """A run's model, objective, optimizer and mesh, and the two compiled functions `train_step` and `eval_step`.

    Every method must be called within `jax.set_mesh(trainer.mesh)`. What needs no array, `train_step.lower` among it, works
    for a mesh of devices that are not there.
    """

    def __init__(self, config: RunConfig, mesh: Mesh) -> None:
        shards = batch_shards(mesh)
        accumulate = config.optimizer.accumulate
        if config.data.rows % (shards * accumulate):
            raise ValueError(
                f"config.data.rows={config.data.rows} does not divide into data*fsdp={shards} shares of "
                f"accumulate={accumulate} micro-batches"
            )
        self.config, self.mesh = config, mesh
        self.model = module_of(config.model)(config.model, compute_dtype(config.dtype), config.remat)
        self.objective: Objective = OBJECTIVES[type(config.objective)](config.objective)
        self.blueprint = Blueprint.of(self.model, config.optimizer.rules, mesh, config.adapters)
        self.rules = self.blueprint.rules
        self.optimizer = make_optimizer(config.optimizer, self.rules, config.steps)
        self.schedule = schedule(config.optimizer, config.steps)
        self.abstract_state = jax.eval_shape(lambda: self._init(jax.random.key(0)))
        self.shardings = self._shardings()
        self.batch_sharding = batch_sharding(mesh)
        replicated = NamedSharding(mesh, PartitionSpec())
        self.train_step = jax.jit(
            self._train_step,
            donate_argnums=0,
            in_shardings=(self.shardings, self.batch_sharding),
            out_shardings=(self.shardings, replicated),
        )
        self.eval_step = jax.jit(self._eval_step, in_shardings=(self.shardings, self.batch_sharding), out_shardings=replicated)

    def init(self) -> TrainState:
        """A fresh state, every array made in its shards."""
        return jax.jit(self._init, out_shardings=self.shardings)(jax.random.key(self.config.seed))

    def state_of(self, params: Params) -> TrainState:
        """A fresh state around given parameters (of another run, or converted)."""
        return jax.jit(self._state_of, out_shardings=self.shardings)(params)

    def put(self, batch: Batch) -> Batch:
        """This process's rows -> its shards of the global batch."""
        return jax.tree.map(lambda x: jax.make_array_from_process_local_data(self.batch_sharding, x), batch)

    def _init(self, key: Array) -> TrainState:
        return self._state_of(unboxed(self.model.init(key, *self.model.example())["params"]))

    def _state_of(self, params: Params) -> TrainState:
        params = self.blueprint.hold(params, jax.random.key(self.config.seed))
        trained, frozen = split(params, self.rules)
        zero = jnp.zeros((), jnp.int32)
        return TrainState(zero, trained, frozen, self.optimizer.init(trained), zero, zero)

    def _shardings(self) -> TrainState:
        trained, frozen = split(self.blueprint.shardings, self.rules)
        replicated = NamedSharding(self.mesh, PartitionSpec())
        opt_state = _like_parameters(self.abstract_state.opt_state, by_path(trained), otherwise=replicated)
        return TrainState(replicated, trained, frozen, opt_state, replicated, replicated)

    def gradients(
        self, trained: Params, frozen: Params, batch: Batch, *, step: Array | None = None, recompute: bool = True
    ) -> tuple[dict[str, Array], Params]:
        """Sums over the batch, and the gradient of the mean loss, in `accumulate` micro-batches.

        Args:
          step: of which the dropout of adapters is; None: without dropout.
          recompute: False: without rematerialisation, to count the mathematics alone.
        """
        weight = self.objective.weight(batch)
        model = self.model if recompute else self.model.clone(remat="none")

        def loss(trained: Params, part: Batch, number: Array | int = 0) -> tuple[Array, dict[str, Array]]:
            params = merge(trained, frozen)
            if step is not None and self.config.adapters:
                key = jax.random.fold_in(jax.random.fold_in(jax.random.key(self.config.seed), step), number)
                params = with_dropout(params, self.config.adapters, key)
            sums = self.objective.sums(model, params, part, recompute=recompute)
            # Divided here, by the whole batch's weight: dividing the gradients would read and write them all once more.
            return sums["loss"] / weight, sums

        grad = jax.grad(loss, has_aux=True)
        micro = self.config.optimizer.accumulate
        if micro == 1:
            gradients, sums = grad(trained, batch)
            return sums, gradients

        # Every device keeps its own rows: micro-batch `a` takes rows a, a + A, a + 2A, ...
        parts = jax.tree.map(lambda x: x.reshape(-1, micro, *x.shape[1:]).swapaxes(0, 1), batch)

        def add(total: Any, numbered: tuple[Batch, Array]) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, total, grad(trained, *numbered)), None

        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(grad, trained, batch))
        (gradients, sums), _ = jax.lax.scan(add, zeros, (parts, jnp.arange(micro)))
        return sums, gradients

    def _train_step(self, state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, Array]]:
        sums, gradients = self.gradients(state.trained, state.frozen, batch, step=state.step)
        norm = optax.global_norm(trained_rows(gradients, self.rules))
        updates, opt_state = self.optimizer.update(gradients, state.opt_state, state.trained)
        finite = jnp.isfinite(norm) & jnp.isfinite(sums["loss"])
        choose = lambda new, old: jax.tree.map(lambda n, o: jnp.where(finite, n, o), new, old)
        bad = (~finite).astype(jnp.int32)
        new = TrainState(
            step=state.step + 1,
            trained=choose(optax.apply_updates(state.trained, updates), state.trained),
            frozen=state.frozen,
            opt_state=choose(opt_state, state.opt_state),
            skipped=state.skipped + bad,
            skipped_in_a_row=(state.skipped_in_a_row + 1) * bad,
        )
        updates_done = state.step - state.skipped
        metrics = self.objective.means(sums) | {
            "gradient_norm": norm,
            "lr": self.schedule(updates_done),
            "skipped": new.skipped,
            "skipped_in_a_row": new.skipped_in_a_row,
        }
        return new, metrics

    def _eval_step(self, state: TrainState, batch: Batch) -> dict[str, Array]:
        return self.objective.sums(self.model, state.params, batch)


def _like_parameters(state: Any, of_params: dict[str, Any], *, otherwise: Any) -> Any:
    """The optimizer's state with, in the place of each leaf, what its parameter has; of what belongs to none, `otherwise`.

    A leaf belongs to the parameter whose path its own ends with: `1/mu/language/embedding`.
    """

    def of(path: tuple[Any, ...], leaf: Any) -> Any:
        names = [str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in path]
        ends = ("/".join(names[start:]) for start in range(len(names)))
        return next((of_params[end] for end in ends if end in of_params), otherwise)

    return jax.tree_util.tree_map_with_path(of, state)
