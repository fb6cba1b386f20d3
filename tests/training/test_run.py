"""Whole runs of `train.py` in processes of their own: killed, interrupted, distributed, damaged."""

import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.tiny import text_run, thorough, tiny_run, write_data
from vlm_jax.config import JsonLinesConfig, RunConfig
from vlm_jax.training.loop import train
from vlm_jax.training.report import Reporter
from vlm_jax.training.run_folder import CheckpointError, write_or_check_config, writing

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """Data of the runs without pictures: they start in half the time, where a test is about processes and signals."""
    return write_data(tmp_path_factory.mktemp("text"), pictures=False)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """One compilation cache for all runs of this file."""
    return tmp_path_factory.mktemp("compiled")


def free_port():
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


def start(data, cache, workdir, *flags, limit=None):
    """
    Args:
      data: the file of the fixture `data`, or of `text`.
      limit: of the bytes of a file.
    """
    recipe = "tests/tiny.py" if (data.parent / "0.png").exists() else "tests/tiny.py:text"
    command = [sys.executable, "train.py", f"--config={recipe}", f"--workdir={workdir}", *flags]
    command += [f"--config.data.source.train={data}", f"--config.data.source.eval={data}"]
    xla = os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=1")
    path = f"{ROOT / 'tests/absent'}{os.pathsep}{ROOT}"
    env = os.environ | {"XLA_FLAGS": xla, "JAX_COMPILATION_CACHE_DIR": str(cache), "PYTHONPATH": path}
    if limit:
        command = ["prlimit", f"--fsize={limit}", *command]
    return subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(process, timeout=240):
    output, _ = process.communicate(timeout=timeout)
    return process.returncode, output


def metrics(workdir):
    """{(step, is it an evaluation): line}"""
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    table = {(line["step"], "eval_loss" in line): line for line in lines}
    assert len(table) == len(lines), "a step stands twice in metrics.jsonl"
    return table


def wait_for(condition, process, seconds=240):
    until = time.time() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        assert time.time() < until
        time.sleep(0.02)


@pytest.fixture(scope="module")
def finished(text, cache, tmp_path_factory):
    """(metrics, output) of a run that nothing disturbed."""
    workdir = tmp_path_factory.mktemp("finished")
    code, output = finish(start(text, cache, workdir))
    assert code == 0, output
    return metrics(workdir), output


def test_a_run_reports_its_table_progress_and_accuracy(finished):
    table, output = finished
    assert sorted(step for step, is_eval in table if not is_eval) == list(range(1, 13))
    assert sorted(step for step, is_eval in table if is_eval) == [6, 12]
    assert "language" in output and "trained" in output and "examples/s" in output and "left 0:00" in output
    assert "step 12: accuracy" in output and "24 held-out answers" in output


def test_stopped_at_any_moment_the_same_command_gives_the_same_numbers(finished, text, cache, tmp_path):
    """One run, whose lines equal an undisturbed run's bit for bit: on a full disk, killed in the first steps, ended by a
    signal, killed after a checkpoint. Every program of the first start comes from the cache: it adds no entry."""
    entries = lambda: {path.name for path in cache.iterdir() if not path.name.endswith("-atime")}
    before, path = entries(), tmp_path / "metrics.jsonl"

    # A file may have 20 kB, as on a disk that is full: the tracebacks are in the log.
    code, output = finish(start(text, cache, tmp_path, limit=20_000))
    assert code == 1 and "Traceback" not in output
    said = [line for line in output.splitlines() if line.startswith("train.py: ")]
    assert len(said) == 1 and f"cannot be written into {tmp_path}" in said[0] and "run the same command again" in said[0]
    assert "Traceback" in (tmp_path / "train.log").read_text()

    def reached(step, since):
        """Whether a process that was started at a time has written this step; what others wrote is there before."""
        if not path.exists() or path.stat().st_mtime_ns < since:
            return False
        lines = path.read_text().splitlines()
        return any(json.loads(line)["step"] >= step for line in lines if line.endswith("}"))

    for number, step in ((signal.SIGKILL, 3), (signal.SIGTERM, 6), (signal.SIGKILL, 8)):
        since, process = time.time_ns(), start(text, cache, tmp_path)
        wait_for(lambda step=step, since=since: reached(step, since), process)
        process.send_signal(number)
        code, output = finish(process)
        if number == signal.SIGKILL:
            assert code == -number
        else:
            assert code == 128 + number and "Traceback" not in output
            assert f"{number.name}: saved step" in output
        if step == 3:  # the next one may begin at a checkpoint
            assert entries() == before
    code, output = finish(start(text, cache, tmp_path))
    assert code == 0, output
    assert "resuming at step" in output
    assert metrics(tmp_path) == finished[0]


def test_another_configuration_is_refused_with_the_difference(text, cache, tmp_path):
    write_or_check_config(tmp_path, run_here(text, text_run()))
    code, output = finish(start(text, cache, tmp_path, "--config.optimizer.lr=0.5", "--config.log_every=1"))
    assert code == 1
    assert "optimizer.lr: 0.003 -> 0.5" in output and "log_every" not in output and "Traceback" not in output


def run_here(file: Path, run: RunConfig) -> RunConfig:
    """A run on these data, for this process."""
    source = JsonLinesConfig(train=str(file), eval=str(file))
    return dataclasses.replace(run, data=dataclasses.replace(run.data, source=source))


def test_too_many_non_finite_steps_stop_the_run_and_name_the_step(text, tmp_path, runs_on_one_device):
    optimizer = dataclasses.replace(tiny_run().optimizer, lr=1e30, clip_norm=1e30, max_bad_steps=2)
    with pytest.raises(FloatingPointError, match="not finite for 3 steps in a row"):
        train(run_here(text, text_run(optimizer=optimizer)), tmp_path)


def test_a_second_train_py_of_one_folder_is_refused(text, cache, tmp_path):
    with writing(tmp_path):
        code, output = finish(start(text, cache, tmp_path))
    assert code == 1 and output.count("\n") == 1
    assert (
        output == f"train.py: --workdir={tmp_path}: another train.py is writing it: wait for it, or choose another --workdir\n"
    )


def test_changed_data_are_named_and_a_flag_goes_on(tmp_path, runs_on_one_device, caplog):
    """Another answer; with the flag the steps already done are kept."""
    file = write_data(tmp_path / "data", pictures=False)
    run = run_here(file, text_run(steps=2, save_every=2))
    train(run, tmp_path / "run")
    before = metrics(tmp_path / "run")
    file.write_text(file.read_text().replace('"red"', '"blue"', 1))
    with pytest.raises(CheckpointError, match="the data of train and eval are not those"):
        train(run, tmp_path / "run")
    assert train(dataclasses.replace(run, accept_changed_data=True), tmp_path / "run").step == 2
    assert "going on, as config.accept_changed_data says" in caplog.text
    assert metrics(tmp_path / "run").items() >= before.items()


def test_odd_lines_of_the_metrics_are_named(tmp_path, caplog):
    path, good = tmp_path / "metrics.jsonl", b'{"step": 1, "loss": 2.0}\n'
    path.write_bytes(b"[1]\n\xff\n" + good + b'{"step": "x"}\n{"step": 7}\n{"st')
    Reporter(tmp_path, 3, config=tiny_run()).close()
    assert "3 lines are no metrics and are dropped, the first is line 1" in caplog.text
    assert path.read_bytes() == good


@pytest.mark.parametrize("seconds", [0.05, 0.3, 1.0])
def test_ctrl_c_in_the_first_moments_is_one_line(text, cache, tmp_path, seconds):
    process = start(text, cache, tmp_path)
    time.sleep(seconds)
    process.send_signal(signal.SIGINT)
    code, output = finish(process)
    if seconds > 0.1 or code == 130:  # before that, Python itself may still be starting
        assert (code, output) == (130, "SIGINT before the first step; run the same command again to resume\n")


@pytest.mark.parametrize("dying", [(1,), thorough((0, 1))], ids=str)
def test_when_a_process_dies_the_other_ends_and_says_so(text, cache, tmp_path, dying):
    """The first coordinates. A restart goes on from the last checkpoint."""
    flags = ["--processes=2", "--peer_timeout=4", "--config.save_every=2", "--config.steps=100000", "--config.mesh.fsdp=2"]
    for killed in dying:
        address = [f"--coordinator=localhost:{free_port()}"]
        both = [start(text, cache, tmp_path, *flags, *address, f"--process={index}") for index in range(2)]
        steps = lambda: [int(path.name) for path in (tmp_path / "checkpoints").glob("*") if path.name.isdigit()]
        before = max(steps(), default=0)
        wait_for(lambda before=before, steps=steps: max(steps(), default=0) > before, both[1 - killed])
        both[killed].kill()
        both[killed].communicate()
        began = time.time()
        code, output = finish(both[1 - killed], timeout=60)
        assert time.time() - began < 30
        assert code == 1 and "Traceback" not in output and "***" not in output
        said = [line for line in output.splitlines() if line.startswith("train.py: ")]
        cause = "process 1 of 2 gave no sign of life for 4 s" if killed else "the first process, which coordinates"
        assert len(said) == 1 and said[0].startswith(f"train.py: {cause}") and "this one ends too" in said[0]


@pytest.mark.parametrize("failing", [0, 1])
def test_when_a_process_fails_the_other_ends_too(text, cache, tmp_path, failing):
    """Each says its own in a line, and nothing waits for the other."""
    flags = ["--processes=2", f"--coordinator=localhost:{free_port()}"]
    wrong = lambda index: ["--config.mesh.fsdp=3"] if index == failing else []
    both = [start(text, cache, tmp_path, *flags, f"--process={index}", *wrong(index)) for index in range(2)]
    began = time.time()
    for index, (code, output) in enumerate([finish(process) for process in both]):
        said = [line for line in output.splitlines() if line.startswith("train.py: ")]
        cause = "fsdp" if index == failing else f"process {failing} of 2 ended with an error, which it printed"
        assert code == 1 and len(said) == 1 and cause in said[0], output
    assert time.time() - began < 60


@pytest.mark.parametrize("pictures", [False, thorough(True)])
def test_two_processes_train_to_the_curve_of_one(data, text, cache, tmp_path, runs_on_one_device, pictures):
    file = data if pictures else text
    flags = [f"--coordinator=localhost:{free_port()}", "--processes=2"]
    both = [start(file, cache, tmp_path / "two", *flags, f"--process={index}") for index in range(2)]
    for code, output in [finish(process) for process in both]:
        assert code == 0, output
    train(run_here(file, tiny_run() if pictures else text_run()), tmp_path / "one")
    ours, one = metrics(tmp_path / "two"), metrics(tmp_path / "one")
    assert ours.keys() == one.keys()
    for key, line in one.items():
        for name, value in line.items():
            assert ours[key][name] == pytest.approx(value, rel=1e-3, abs=1e-5), (key, name)
