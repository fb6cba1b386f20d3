"""LoRA and int8 in a run: what is added to the parameters, what is trained, dropout, and that a killed run goes on exactly."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.tiny import mesh_of, random_batch, tiny_model, tiny_run
from vlm_jax.config import LoraConfig, ParamRule
from vlm_jax.layers.lora import merged, without_adapters
from vlm_jax.paths import by_path
from vlm_jax.training.adapters import with_dropout
from vlm_jax.training.checkpoint import Checkpoints, load_run
from vlm_jax.training.run_folder import write_or_check_config
from vlm_jax.training.step import Trainer
from vlm_jax.training.table import start_table

QUERIES = LoraConfig(pattern="^language/.*attention/(query|out)", rank=2, alpha=6.0, dropout=0.3)
MLPS = LoraConfig(pattern="^language/.*mlp|linear", rank=3, alpha=3.0)
RULES = (ParamRule(pattern="/lora/", decay=0.0), ParamRule(pattern="(embedding|kernel)$", frozen=True))


def lora_run(rules=RULES, adapters=(QUERIES, MLPS), **changes):
    # A language model alone: it compiles fastest.
    model = dataclasses.replace(tiny_model(), vision=None, connector=None, fusion=None)
    run = tiny_run(model=model, adapters=adapters, **changes)
    return dataclasses.replace(run, optimizer=dataclasses.replace(run.optimizer, rules=rules))


def int8(rules=RULES):
    return tuple(dataclasses.replace(rule, frozen_dtype="int8") if rule.frozen else rule for rule in rules)


@pytest.fixture(scope="module")
def trained():
    """A QLoRA trainer on a mesh of two by two, its first state, and those after two and four steps."""
    mesh = mesh_of(1, 2, 2)
    with jax.set_mesh(mesh):
        trainer = Trainer(lora_run(int8()), mesh)
        states = [trainer.init()]
        batch = trainer.put(random_batch())
        first = jax.device_get(states[0])
        state, after = states[0], {0: first}
        for step in range(1, 5):
            state, metrics = trainer.train_step(state, batch)
            after[step] = jax.device_get(state)
        assert float(metrics["gradient_norm"]) > 0
    return trainer, after


def test_shapes_shardings_and_what_is_trained(trained):
    trainer, after = trained
    leaves, mine = by_path(after[0].params), by_path(after[0].trained)
    query = "language/layers/attention/query"
    assert leaves[f"{query}/kernel"].dtype == jnp.int8 and leaves[f"{query}/kernel_scale"].shape == (3, 1, 8, 4)
    assert leaves[f"{query}/lora/default/a"].shape == (3, 32, 2) and leaves[f"{query}/lora/default/b"].shape == (3, 2, 8, 4)
    np.testing.assert_array_equal(leaves[f"{query}/lora/default/scale"], [3.0] * 3)
    assert leaves["language/layers/mlp/up/lora/default/a"].shape == (3, 32, 3)
    assert leaves["language/embedding"].dtype == jnp.bfloat16
    assert {path for path in mine if not path.endswith("_norm/scale")} == {
        path for path in leaves if "/lora/" in path and not path.endswith("scale")
    }
    assert not any("key/lora" in path for path in leaves)
    spec = lambda path: trainer.blueprint.placements[path].spec
    assert spec(f"{query}/lora/default/b")[2] == "tensor" and spec(f"{query}/lora/default/a")[1] == "fsdp"
    assert spec(f"{query}/kernel_scale")[2] == "tensor" and spec(f"{query}/kernel_scale")[1] is None
    table = start_table(trainer)[0]
    cells = [list(column.cells) for column in table.columns]
    assert "language lora/default" in cells[0] and "int8" in cells[3]


def test_only_adapters_and_the_rest_that_is_trained_move(trained):
    _, after = trained
    before, now = by_path(after[0].params), by_path(after[4].params)
    for path, leaf in before.items():
        moved = not np.array_equal(leaf, now[path])
        assert moved == (path in by_path(after[0].trained)), path


def test_a_fresh_adapter_changes_nothing_and_a_merged_one_gives_the_same(trained):
    trainer, after = trained
    model, batch = trainer.model, random_batch()
    logits = jax.jit(lambda params: model.apply({"params": params}, batch))
    first = logits(after[0].params)
    np.testing.assert_array_equal(first, logits(without_adapters(after[0].params)))
    late = after[4].params
    assert np.abs(logits(late) - first).max() > 1e-3
    np.testing.assert_allclose(logits(late), logits(merged(late)), atol=2e-5)
    names = by_path(merged(late))
    assert not any("/lora/" in path for path in names) and names["language/layers/attention/query/kernel"].dtype == jnp.float32
    assert names["language/layers/attention/key/kernel"].dtype == jnp.int8


def test_a_killed_run_goes_on_exactly(trained, tmp_path):
    """Its dropout is of the step: from a checkpoint of step 2, on another mesh's load too, step 4 is what it was."""
    trainer, after = trained
    write_or_check_config(tmp_path, trainer.config)
    with jax.set_mesh(trainer.mesh):
        checkpoints = Checkpoints(tmp_path, keep_last=2, keep_best=0)
        checkpoints.save(jax.device_put(after[2], trainer.shardings), 2)
        checkpoints.wait()
        state, step = checkpoints.restore(trainer)
        assert step == 2
        batch = trainer.put(random_batch())
        for _ in range(2):
            state, _ = trainer.train_step(state, batch)
        for ours, theirs in zip(jax.tree.leaves(state), jax.tree.leaves(after[4]), strict=True):
            np.testing.assert_array_equal(ours, theirs)
        checkpoints.close()
    run = load_run(tmp_path, mesh_of(1, 1, 1), dtype=jnp.bfloat16)
    leaves = by_path(run.params)
    query = "language/layers/attention/query"
    types = {name: str(leaves[f"{query}/{name}"].dtype) for name in ("kernel", "kernel_scale", "lora/default/a")}
    assert types == {"kernel": "int8", "kernel_scale": "float32", "lora/default/a": "bfloat16"}
    np.testing.assert_array_equal(leaves[f"{query}/kernel"], by_path(after[2].params)[f"{query}/kernel"])


def test_dropout_is_of_the_step_and_the_path(trained):
    trainer, after = trained
    batch = trainer.put(random_batch())
    with jax.set_mesh(trainer.mesh):
        losses = []
        for step in (4, 9, 4):
            state = dataclasses.replace(after[4], step=np.int32(step))
            losses.append(float(trainer.train_step(jax.device_put(state, trainer.shardings), batch)[1]["loss"]))
    assert losses[0] == losses[2] != losses[1]
    made = by_path(with_dropout(after[0].params, trainer.config.adapters, jax.random.key(0)))
    keys = [jax.random.key_data(leaf).tolist() for path, leaf in made.items() if path.endswith("dropout/key")]
    every = {tuple(key) for of_layers in keys for key in of_layers}
    assert len(keys) == 2 and len(every) == 6, "two maps of three layers; the others of MLPS have no dropout"


@pytest.mark.parametrize(
    ("adapters", "rules", "said"),
    [
        (
            (LoraConfig(pattern="attention/querry", rank=2, alpha=2.0),),
            RULES,
            "no linear map's path matches 'attention/querry'",
        ),
        ((LoraConfig(pattern="query", rank=0, alpha=2.0),), RULES, "rank=0"),
        ((LoraConfig(pattern="query", rank=2, alpha=2.0, name="a/b"),), RULES, "name 'a/b'"),
        (
            (QUERIES,),
            (ParamRule(pattern="^language", frozen=True),),
            r"'default' is frozen by the rule .*put ParamRule\(pattern='/lora/'\)",
        ),
    ],
)
def test_what_cannot_be(adapters, rules, said):
    mesh = mesh_of(1, 1, 1)
    with jax.set_mesh(mesh), pytest.raises(ValueError, match=said):
        Trainer(lora_run(rules, adapters), mesh)
