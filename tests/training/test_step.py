import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.tiny import initial_state, mesh_of, random_batch, thorough, tiny_run
from vlm_jax.config import OptimizerConfig, ParamRule
from vlm_jax.paths import by_path
from vlm_jax.training.step import Trainer
from vlm_jax.training.table import start_table

MESHES = [thorough((1, 1, 8)), thorough((1, 8, 1)), (2, 2, 2)]
FLAMINGO_RULES = (
    ParamRule(pattern="^vision", frozen=True),
    ParamRule(pattern="^connector", decay=0.0),
    ParamRule(pattern="^language/embedding", rows_from=300),
    ParamRule(pattern="^language", frozen=True, frozen_dtype="bfloat16"),
)


def curve(run, mesh_sizes, steps=5):
    """Losses and gradient norms of some steps, and the last state, on the given mesh."""
    mesh = mesh_of(*mesh_sizes)
    with jax.set_mesh(mesh):
        trainer = Trainer(run, mesh)
        state = initial_state(trainer)
        metrics = []
        for seed in range(steps):
            state, step = trainer.train_step(state, trainer.put(random_batch(run.data.rows, seed)))
            metrics.append((float(step["loss"]), float(step["gradient_norm"])))
        return np.array(metrics), state, trainer


def run_of(**changes):
    optimizer = OptimizerConfig(lr=1e-2, warmup_steps=1, **changes)
    return tiny_run(optimizer=optimizer, steps=60)


@pytest.fixture(scope="module")
def one_device():
    return curve(run_of(), (1, 1, 1))


@pytest.mark.parametrize("sizes", MESHES)
def test_every_mesh_gives_the_curve_of_one_device(one_device, sizes):
    metrics, state, _ = curve(run_of(), sizes)
    np.testing.assert_allclose(metrics, one_device[0], rtol=2e-5)
    kernel = state.trained["language"]["layers"]["mlp"]["up"]["kernel"]  # [layers, embed, mlp]
    moment = state.opt_state[2].mu["language"]["layers"]["mlp"]["up"]["kernel"]
    layers, embed, mlp = kernel.shape
    assert kernel.sharding.shard_shape(kernel.shape) == (layers, embed // sizes[1], mlp // sizes[2])
    assert moment.sharding == kernel.sharding


def test_the_loss_falls_on_one_repeated_batch(one_device):
    trainer = one_device[2]
    with jax.set_mesh(trainer.mesh):
        state, batch = initial_state(trainer), trainer.put(random_batch())
        losses = []
        for _ in range(40):
            state, metrics = trainer.train_step(state, batch)
            losses.append(float(metrics["loss"]))
    assert losses[-1] < 0.3 * losses[0]


def test_accumulated_micro_batches_equal_the_whole_batch(one_device):
    run = run_of(accumulate=4)
    np.testing.assert_allclose(curve(run, (2, 1, 1))[0], one_device[0], rtol=2e-5)


def test_flamingos_own_split_leaves_the_frozen_parts_alone():
    run = tiny_run(optimizer=dataclasses.replace(tiny_run().optimizer, rules=FLAMINGO_RULES))
    mesh = mesh_of(1, 1, 1)
    with jax.set_mesh(mesh):
        trainer = Trainer(run, mesh)
        before = jax.device_get(by_path(initial_state(trainer).params))
    _, state, trainer = curve(run, (1, 1, 1))
    after = jax.device_get(by_path(state.params))
    assert {path.split("/")[0] for path in by_path(state.frozen)} == {"vision", "language"}
    assert by_path(state.opt_state[2].mu).keys() == by_path(state.trained).keys()
    assert state.frozen["language"]["final_norm"]["scale"].dtype == jnp.bfloat16
    for path, value in after.items():
        moved = np.any(np.asarray(before[path], np.float32) != np.asarray(value, np.float32))
        assert moved == (path.startswith(("connector", "fusion")) or path == "language/embedding"), path
    np.testing.assert_array_equal(before["language/embedding"][:300], after["language/embedding"][:300])
    assert np.all(np.any(before["language/embedding"][300:] != after["language/embedding"][300:], axis=1))


def test_a_non_finite_update_is_skipped_and_counted(one_device):
    trainer = one_device[2]
    with jax.set_mesh(trainer.mesh):
        state = initial_state(trainer)
        good, bad = random_batch(), random_batch()
        bad.weights[0, 1] = np.inf
        state, _ = trainer.train_step(state, trainer.put(good))
        kept = jax.device_get((state.trained, state.opt_state))
        for expected in (1, 2):
            state, metrics = trainer.train_step(state, trainer.put(bad))
            assert float(metrics["skipped"]) == float(metrics["skipped_in_a_row"]) == expected
        for before, after in zip(jax.tree.leaves(kept), jax.tree.leaves((state.trained, state.opt_state)), strict=True):
            np.testing.assert_array_equal(before, after)
        state, metrics = trainer.train_step(state, trainer.put(good))
        assert (float(metrics["skipped"]), float(metrics["skipped_in_a_row"])) == (2, 0)
        assert int(state.step) == 4


def test_rows_that_do_not_divide_are_an_error_that_says_what_to_change():
    run = tiny_run(data=dataclasses.replace(tiny_run().data, rows=6))
    with pytest.raises(ValueError, match=r"data\.rows=6"):
        Trainer(run, mesh_of(4, 2, 1))


def test_the_table_tells_parts_states_and_what_could_not_be_sharded():
    run = tiny_run(optimizer=dataclasses.replace(tiny_run().optimizer, rules=FLAMINGO_RULES))
    mesh = mesh_of(1, 1, 8)
    with jax.set_mesh(mesh):
        trainer = Trainer(run, mesh)
        table, notes = start_table(trainer)
    columns = [list(column.cells) for column in table.columns]
    assert columns[0] == ["connector", "fusion", "language", "language", "vision", "all"]
    assert columns[2][:5] == ["trained", "trained", "frozen", "rows 300.. trained", "frozen"]
    total = sum(leaf.size for leaf in jax.tree.leaves(trainer.abstract_state.params))
    assert columns[1][-1] == f"{total:,}"
    assert any("kv_heads=4 is not divisible by tensor=8" in note for note in notes)
