import dataclasses
import errno
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.tiny import initial_state, mesh_of, tiny_run
from vlm_jax.config_dict import to_dict
from vlm_jax.files import ChecksumError
from vlm_jax.training.checkpoint import Checkpoints, fingerprint, load_run
from vlm_jax.training.run_folder import CheckpointError, differences, read_config, seal, write_or_check_config, writing
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
        state = initial_state(trainer)
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


def test_when_all_are_damaged_the_run_does_not_begin_anew(saved, tmp_path):
    """Nor at a second start, which finds none any more."""
    folder = copy_of(saved[0], tmp_path / "run")
    for step in (1, 2, 3):
        damage_by_lying(folder / "checkpoints" / str(step))
    for _ in range(2):
        with pytest.raises(CheckpointError, match=r"all checkpoints of .* are damaged; they are in .*damaged\. Restore one"):
            restore(folder)
    (folder / "damaged" / "2").rename(folder / "checkpoints" / "2")
    damage_by_lying(folder / "checkpoints" / "2")  # and back
    assert restore(folder)[1] == 2


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        OSError(errno.EIO, "Input/output error"),
        ValueError("RESOURCE_EXHAUSTED: out of memory"),
        ValueError("Error reading /x: Too many open files"),
    ],
    ids=repr,
)
def test_what_says_nothing_about_a_checkpoint_sets_none_aside(saved, tmp_path, monkeypatch, error):
    folder = copy_of(saved[0], tmp_path / "run")

    def fails(*_, **__):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "_restore", fails)
        patch.setattr("vlm_jax.training.checkpoint._params_of", fails)
        for read in (lambda: restore(folder), lambda: load_run(folder, mesh_of(1, 1, 1))):
            with pytest.raises(CheckpointError, match=r"cannot be read at the moment .* it was left where it is"):
                read()
    assert not (folder / "damaged").exists() and restore(folder)[1] == 3


def damage_by_lying_of_parameters(step):
    path = next(path for path in (step / "meta").rglob("*") if path.is_file())
    meta = json.loads(path.read_text())
    path.write_text(json.dumps(meta | {"params": meta["params"] ^ 1}))


def test_damaged_weights_are_not_used_for_inference(saved, tmp_path, caplog):
    folder = copy_of(saved[0], tmp_path / "run")
    damage_by_lying_of_parameters(folder / "checkpoints" / "3")
    mesh = mesh_of(1, 1, 1)
    with jax.set_mesh(mesh):
        assert load_run(folder, mesh).step == 2
        assert f"{folder / 'checkpoints' / '3'} is damaged (its parameters are not those that were saved)" in caplog.text
        with pytest.raises(CheckpointError, match="all are damaged"):
            load_run(folder, mesh, step=3)


def test_a_flipped_bit_of_any_file_is_noticed(saved, tmp_path):
    """Wherever it is: what is read is right, or refused."""
    whole, mesh = jax.device_get(load_run(saved[0], mesh_of(1, 1, 1)).params), mesh_of(1, 1, 1)
    files = [path.relative_to(saved[0]) for path in (saved[0] / "checkpoints" / "3").rglob("*") if path.is_file()]
    rng, refused = np.random.default_rng(0), 0
    for number in range(64):
        if number >= 16 and refused > 3:  # most places are the optimizer's, which is not read: so more may be needed
            break
        folder = copy_of(saved[0], tmp_path / str(number))
        path = (
            folder / files[rng.integers(len(files))]
            if number % 2
            else max((folder / file for file in files), key=lambda file: file.stat().st_size)
        )
        data = bytearray(path.read_bytes())
        if not data:
            continue
        data[rng.integers(len(data))] ^= 1 << rng.integers(8)
        path.write_bytes(data)
        try:
            params = load_run(folder, mesh, step=3).params
        except CheckpointError:
            refused += 1
            continue
        for ours, theirs in zip(jax.tree.leaves(params), jax.tree.leaves(whole), strict=True):
            np.testing.assert_array_equal(ours, theirs)
    assert refused > 3


def test_other_data_than_before_are_refused(saved, tmp_path):
    folder, mesh = tmp_path / "run", mesh_of(1, 1, 1)
    write_or_check_config(folder, tiny_run())
    with jax.set_mesh(mesh):
        saving = Checkpoints(folder, 1, 0, data={"train": 7, "eval": 8})
        trainer = Trainer(tiny_run(), mesh)
        saving.save(initial_state(trainer), 4)
        saving.wait()
        assert saving.restore(trainer)[1] == 4
        saving.close()
        changed = Checkpoints(folder, 1, 0, data={"train": 9, "eval": 8})
        with pytest.raises(CheckpointError, match=r"the data of train are not those .* until step 4: bring those back"):
            changed.restore(trainer)
        assert changed.restore(Trainer(tiny_run(accept_changed_data=True), mesh))[1] == 4
        changed.close()


@pytest.mark.parametrize("name", ["config.json", "tokenizer/tokenizer.json"])
def test_a_changed_file_of_a_run_is_named(saved, tmp_path, name):
    folder = copy_of(saved[0], tmp_path / "run")
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer" / "tokenizer.json").write_text("{}")
    seal(folder)
    read_config(folder)
    (folder / name).write_text((folder / name).read_text().replace("1", "2") + " ")
    with pytest.raises(ChecksumError, match=rf"{name}: is not the file that was written .*remove .*checksums\.sha256"):
        read_config(folder)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"model_type": "llama"}', "{" * 100_000])
def test_a_config_that_is_none(tmp_path, content):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"config\.json is damaged, or was written by another version"):
        read_config(tmp_path)


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"--workdir=.*file is a file"), writing(tmp_path / "file"):
        pass
    with pytest.raises(CheckpointError, match="--workdir=/proc/here: No such file"), writing(Path("/proc/here")):
        pass


def test_a_folder_is_written_by_one_run(tmp_path):
    with writing(tmp_path), pytest.raises(CheckpointError, match=r"another train\.py is writing it"), writing(tmp_path):
        pass
    with writing(tmp_path):
        pass


def test_the_last_ones_and_the_best_one_are_kept(tmp_path):
    run, mesh = tiny_run(), mesh_of(1, 1, 1)
    with jax.set_mesh(mesh):
        trainer = Trainer(run, mesh)
        checkpoints = Checkpoints(tmp_path, keep_last=2, keep_best=1)
        state = initial_state(trainer)
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
