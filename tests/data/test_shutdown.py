"""Worker processes end with the trainer, however it ends."""

import dataclasses
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from data_helpers import parts, run_config

SCRIPT = """
import pickle, sys, time
from vlm_jax.data.pipeline import TrainBatches
if __name__ == "__main__":
    batches = TrainBatches(*pickle.load(open(sys.argv[1], "rb")))
    next(batches)
    print("started", flush=True)
    while True:
        next(batches)
        time.sleep(0.01)
"""


def descendants(pid: int) -> list[int]:
    found = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        for child in map(int, (task / "children").read_text().split()):
            found += [child, *descendants(child)]
    return found


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("sent", ["SIGINT", "SIGKILL"])
def test_no_worker_outlives_the_trainer(jsonl_config, tmp_path, sent):
    data = dataclasses.replace(jsonl_config, workers=1 if sent == "SIGKILL" else 2)
    config = run_config(data, steps=10**6)
    (tmp_path / "args").write_bytes(pickle.dumps((config, *parts(data))))
    (tmp_path / "script.py").write_text(SCRIPT)
    command = [sys.executable, str(tmp_path / "script.py"), str(tmp_path / "args")]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True, cwd=os.getcwd()
    )
    assert process.stdout.readline() == "started\n", process.stderr.read()
    workers = descendants(process.pid)
    assert len(workers) >= data.workers
    if sent == "SIGINT":
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to all of them
        _, errors = process.communicate(timeout=20)
        assert errors.count("KeyboardInterrupt") == 1 and "spawn_main" not in errors, errors  # the trainer's alone
    else:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    deadline = time.monotonic() + 10
    while any(map(alive, workers)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(alive, workers))


def test_the_end_of_the_data_leaves_no_shared_memory(jsonl_config, tmp_path):
    data = dataclasses.replace(jsonl_config, workers=1)
    (tmp_path / "args").write_bytes(pickle.dumps((run_config(data, steps=3), *parts(data))))
    script = SCRIPT.split("    batches =")[0] + (
        "    for batch in TrainBatches(*pickle.load(open(sys.argv[1], 'rb'))):\n        del batch\n    time.sleep(0.5)\n"
    )
    (tmp_path / "script.py").write_text(script)
    command = [sys.executable, str(tmp_path / "script.py"), str(tmp_path / "args")]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=os.getcwd())
    assert ended.returncode == 0 and "leaked" not in ended.stderr, ended.stderr
