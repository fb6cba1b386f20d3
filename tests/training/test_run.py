"""Whole runs of `train.py` in processes of their own: killed, interrupted, distributed, damaged."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.tiny import write_data

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """One compilation cache for all runs of this file."""
    return tmp_path_factory.mktemp("compiled")


def start(data, cache, workdir, *flags, devices=1, log=None):
    command = [sys.executable, "train.py", "--config=tests/tiny.py", f"--workdir={workdir}", *flags]
    command += [f"--config.data.source.train={data}", f"--config.data.source.eval={data}"]
    xla = os.environ["XLA_FLAGS"].replace("device_count=8", f"device_count={devices}")
    env = os.environ | {"XLA_FLAGS": xla, "JAX_COMPILATION_CACHE_DIR": str(cache), "PYTHONPATH": str(ROOT)}
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
def undisturbed(data, cache, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("undisturbed")
    code, output = finish(start(data, cache, workdir))
    assert code == 0, output
    return metrics(workdir), output


def test_a_run_reports_its_table_progress_and_accuracy(undisturbed):
    table, output = undisturbed
    assert sorted(step for step, is_eval in table if not is_eval) == list(range(1, 13))
    assert sorted(step for step, is_eval in table if is_eval) == [6, 12]
    assert "vision" in output and "trained" in output and "examples/s" in output and "left 0:00" in output
    assert "step 12: accuracy" in output and "24 held-out answers" in output


def test_killed_at_any_moment_the_same_command_gives_the_same_numbers(undisturbed, data, cache, tmp_path):
    """Killed in the first steps, after the first checkpoint, and again: the lines equal an undisturbed run's bit for bit."""
    reached = lambda step: (
        lambda: (
            (tmp_path / "metrics.jsonl").exists()
            and any(
                json.loads(line)["step"] >= step
                for line in (tmp_path / "metrics.jsonl").read_text().splitlines()
                if line.endswith("}")
            )
        )
    )
    for step in (3, 6, 9):
        process = start(data, cache, tmp_path)
        wait_for(reached(step), process)
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
    code, output = finish(start(data, cache, tmp_path))
    assert code == 0, output
    assert "resuming at step" in output
    assert metrics(tmp_path) == undisturbed[0]


def test_a_second_start_compiles_nothing(undisturbed, data, cache, tmp_path):
    """Every program of a second start comes from the cache: it adds no entry."""
    before = {path.name for path in cache.iterdir() if not path.name.endswith("-atime")}
    code, output = finish(start(data, cache, tmp_path))
    assert code == 0, output
    assert {path.name for path in cache.iterdir() if not path.name.endswith("-atime")} == before


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_leaves_cleanly(undisturbed, data, cache, tmp_path, number):
    process = start(data, cache, tmp_path, "--config.save_every=1000")
    path = tmp_path / "metrics.jsonl"
    wait_for(lambda: path.exists() and path.read_text().count("\n") >= 3, process)
    process.send_signal(number)
    code, output = finish(process)
    if code == 0:
        pytest.skip("the run ended before the signal came")
    assert code == 128 + number and "Traceback" not in output
    assert f"{number.name}: saved step" in output
    code, output = finish(start(data, cache, tmp_path, "--config.save_every=1000"))
    assert code == 0 and "resuming at step" in output, output
    assert metrics(tmp_path) == undisturbed[0]


def test_another_configuration_is_refused_with_the_difference(undisturbed, data, cache, tmp_path):
    assert finish(start(data, cache, tmp_path, "--config.steps=1"))[0] == 0
    code, output = finish(start(data, cache, tmp_path, "--config.steps=1", "--config.optimizer.lr=0.5", "--config.log_every=1"))
    assert code == 1
    assert "optimizer.lr: 0.003 -> 0.5" in output and "log_every" not in output and "Traceback" not in output


def test_too_many_non_finite_steps_stop_the_run_and_name_the_step(data, cache, tmp_path):
    flags = ["--config.optimizer.lr=1e30", "--config.optimizer.clip_norm=1e30", "--config.optimizer.max_bad_steps=2"]
    code, output = finish(start(data, cache, tmp_path, *flags))
    assert code == 1
    assert "not finite for 3 steps in a row" in output and "Traceback" not in output


def test_two_processes_train_to_the_curve_of_one(undisturbed, data, cache, tmp_path):
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    flags = [f"--coordinator=localhost:{port}", "--processes=2"]
    both = [start(data, cache, tmp_path, *flags, f"--process={index}", devices=2) for index in range(2)]
    for code, output in [finish(process) for process in both]:
        assert code == 0, output
    ours, one = metrics(tmp_path), undisturbed[0]
    assert ours.keys() == one.keys()
    for key, line in one.items():
        for name, value in line.items():
            assert ours[key][name] == pytest.approx(value, rel=1e-3, abs=1e-5), (key, name)
