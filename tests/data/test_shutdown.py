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

from vlm_jax.config import DataConfig

SCRIPT = """
import pickle, signal, sys, time
from vlm_jax.data.pipeline import TrainBatches
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs begin with SIGINT ignored
if __name__ == "__main__":
    batches = TrainBatches(*pickle.load(open(sys.argv[1], "rb")))
"""
ENDLESS = """
    next(batches)
    print("started", flush=True)
    while True:
        next(batches)
        time.sleep(0.01)
"""


TO_THE_END = """
    for batch in batches:
        del batch
    time.sleep(0.5)
"""


def command(folder: Path, data: DataConfig, steps: int, body: str) -> list[str]:
    """Runs `body` in a process of its own that has `batches`."""
    (folder / "args").write_bytes(pickle.dumps((run_config(data, steps=steps), *parts(data))))
    (folder / "script.py").write_text(SCRIPT + body)
    return [sys.executable, str(folder / "script.py"), str(folder / "args")]


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
    process = subprocess.Popen(
        command(tmp_path, data, 10**6, ENDLESS),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        cwd=os.getcwd(),
    )
    try:
        assert process.stdout.readline() == "started\n", process.stderr.read()
        workers = descendants(process.pid)
        assert len(workers) >= data.workers
        if sent == "SIGINT":
            os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to all of them
            _, errors = process.communicate(timeout=20)
            assert errors.count("KeyboardInterrupt") == 1 and "spawn_main" not in errors, errors  # the trainer's alone
        else:
            process.kill()
    finally:
        process.kill()
        process.wait()
    deadline = time.monotonic() + 10
    while any(map(alive, workers)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(alive, workers))


def test_the_end_of_the_data_leaves_no_shared_memory(jsonl_config, tmp_path):
    data = dataclasses.replace(jsonl_config, workers=1)
    run = command(tmp_path, data, 3, TO_THE_END)
    ended = subprocess.run(run, capture_output=True, text=True, timeout=120, cwd=os.getcwd())
    assert ended.returncode == 0 and "leaked" not in ended.stderr, ended.stderr
