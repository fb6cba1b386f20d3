import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.tiny import mesh_of, tiny_run
from vlm_jax.config_dict import to_dict
from vlm_jax.training.checkpoint import (
    CheckpointError,
    Checkpoints,
    differences,
    fingerprint,
    load_run,
    read_config,
    write_or_check_config,
)
from vlm_jax.training.step import Trainer


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A run's folder with checkpoints 1, 2, 3 of states that differ, saved on fsdp=2 x tensor=2."""
    folder = tmp_path_factory.mktemp("run")
    run = tiny_run()
    write_or_check_config(folder, run)
    mesh = mesh_of(1, 2, 2)
    with jax.set_mesh(mesh):
        trainer = Trainer(run, mesh)
        checkpoints = Checkpoints(folder, keep_last=3, keep_best=0)
        state = trainer.init()
        for step in (1, 2, 3):
            state = dataclasses.replace(state, step=state.step + 1, trained=jax.tree.map(lambda p: p + 1, state.trained))
            checkpoints.save(state, step)
        checkpoints.wait()
        checkpoints.close()
    return folder, jax.device_get(state)


def copy_of(folder, target):
    import shutil

    shutil.copytree(folder, target, dirs_exist_ok=True)
    return target


def restore(folder, sizes=(1, 1, 1)):
    mesh = mesh_of(*sizes)
    with jax.set_mesh(mesh):
        checkpoints = Checkpoints(folder, keep_last=3, keep_best=0)
        try:
            return checkpoints.restore(Trainer(tiny_run(), mesh))
        finally:
            checkpoints.close()


@pytest.mark.parametrize("sizes", [(1, 1, 1), (4, 1, 2)])
def test_a_checkpoint_of_one_mesh_restores_on_another(saved, sizes):
    state, position = restore(saved[0], sizes)
    assert position == 3
    for ours, theirs in zip(jax.tree.leaves(state), jax.tree.leaves(saved[1]), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    kernel = state.trained["language"]["layers"]["mlp"]["up"]["kernel"]
    assert kernel.sharding.shard_shape(kernel.shape)[2] == kernel.shape[2] // sizes[2]


def damage_by_cutting(step):
    for path in (step / "state").rglob("*"):
        if path.is_file() and path.stat().st_size > 100:
            path.write_bytes(path.read_bytes()[:50])


def damage_by_removing_the_meta(step):
    for path in (step / "meta").rglob("*"):
        if path.is_file():
            path.unlink()


def damage_by_lying(step):
    path = next(path for path in (step / "meta").rglob("*") if path.is_file())
    meta = json.loads(path.read_text())
    path.write_text(json.dumps(meta | {"fingerprint": meta["fingerprint"] ^ 1}))


@pytest.mark.parametrize("damage", [damage_by_cutting, damage_by_removing_the_meta, damage_by_lying])
def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_is_used(saved, tmp_path, damage, caplog):
    folder = copy_of(saved[0], tmp_path / "run")
    damage(folder / "checkpoints" / "3")
    state, position = restore(folder)
    assert position == int(state.step) == 2
    assert f"{folder / 'checkpoints' / '3'} is damaged" in caplog.text
    assert (folder / "damaged" / "3").is_dir() and not (folder / "checkpoints" / "3").exists()


def test_when_all_are_damaged_the_run_does_not_begin_anew_in_silence(saved, tmp_path):
    folder = copy_of(saved[0], tmp_path / "run")
    for step in (1, 2, 3):
        damage_by_lying(folder / "checkpoints" / str(step))
    with pytest.raises(CheckpointError, match="all 3 checkpoints"):
        restore(folder)


def test_the_last_ones_and_the_best_one_are_kept(tmp_path):
    run, mesh = tiny_run(), mesh_of(1, 1, 1)
    with jax.set_mesh(mesh):
        trainer = Trainer(run, mesh)
        checkpoints = Checkpoints(tmp_path, keep_last=2, keep_best=1)
        state = trainer.init()
        for step, accuracy in enumerate([0.1, 0.9, 0.2, 0.3, 0.4], 1):
            checkpoints.save(state, step, {"accuracy": accuracy})
        checkpoints.wait()
        assert checkpoints.steps == [2, 4, 5]
        checkpoints.close()


def test_load_run_gives_the_parameters_alone_in_the_wished_type(saved):
    mesh = mesh_of(1, 1, 2)
    with jax.set_mesh(mesh):
        run = load_run(saved[0], mesh, dtype=jnp.bfloat16)
    assert run.step == 3 and run.config == tiny_run()
    expected = saved[1].trained["language"]["embedding"].astype(jnp.bfloat16)
    np.testing.assert_array_equal(run.params["language"]["embedding"], expected)


@pytest.mark.parametrize("make,message", [(False, "no such folder"), (True, r"no config\.json")])
def test_a_folder_that_is_no_run_is_one_clear_error(tmp_path, make, message):
    folder = tmp_path / "nothing"
    if make:
        folder.mkdir()
    with pytest.raises(CheckpointError, match=message):
        load_run(folder, mesh_of(1, 1, 1))


def test_a_step_that_is_not_there_names_those_that_are(saved):
    with pytest.raises(CheckpointError, match=r"no checkpoint of step 7; it has \[1, 2, 3\]"):
        load_run(saved[0], mesh_of(1, 1, 1), step=7)


def test_differences_leave_out_what_changes_no_number():
    old, new = to_dict(tiny_run()), to_dict(tiny_run(log_every=99, steps=77))
    new["mesh"]["tensor"] = 8
    new["data"]["workers"] = 3
    new["optimizer"]["b2"] = 0.5
    assert differences(old, new) == ["optimizer.b2: 0.999 -> 0.5", "steps: 12 -> 77"]


def test_a_fingerprint_sees_a_flipped_bit_and_an_exchange_but_not_the_sharding():
    a, b = jnp.arange(8, dtype=jnp.float32), jnp.arange(8, dtype=jnp.float32)[::-1] + 0.5
    base = int(fingerprint({"a": a, "b": b}))
    flipped = a.at[3].set(jnp.nextafter(a[3], 9))
    assert int(fingerprint({"a": flipped, "b": b})) != base
    assert int(fingerprint({"a": b, "b": a})) != base
    mesh = mesh_of(1, 1, 8)
    spread = jax.device_put(a, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("tensor")))
    assert int(fingerprint({"a": spread, "b": jax.device_put(b, spread.sharding)})) == base


def test_a_run_of_another_version_is_told(tmp_path):
    fields = to_dict(tiny_run())
    fields["model"]["connector"]["norm_eps"] = 1e-5
    (tmp_path / "config.json").write_text(json.dumps(fields))
    with pytest.raises(CheckpointError, match=r"config\.json is damaged, or was written by another version of vlm_jax"):
        read_config(tmp_path)
