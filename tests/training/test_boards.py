"""Weights & Biases: one row a step, under one id, also where a run was killed; for real where the package is installed."""

import json
import struct
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest

from tests.tiny import tiny_run
from vlm_jax.training.boards import WandbBoard
from vlm_jax.training.report import Reporter

CONFIG = tiny_run(wandb="project")


@pytest.fixture
def rows(monkeypatch):
    """What is handed over: (id, step, values), with a stand-in for the package."""
    handed = []

    def init(**settings):
        assert settings["project"] == "project" and settings["resume"] == "allow" and settings["config"]["steps"] == 12
        log = lambda values, step: handed.append((settings["id"], step, values))
        return SimpleNamespace(log=log, finish=lambda: handed.append((settings["id"], None, "finished")))

    fake = SimpleNamespace(init=init, Image=lambda x: x.shape, Html=str, Settings=lambda **settings: settings)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return handed


def test_a_step_is_one_row_and_a_resumed_run_repeats_none(tmp_path, rows):
    board = WandbBoard(tmp_path, CONFIG)
    for step in (2, 4, 6):
        board.plot(step, {"train/loss": 1 / step})
        board.show(step, pictures={"samples": np.zeros((8, 4, 3), np.uint8)}, texts={"samples": "a < b"})
        board.flush()
    del board  # killed: step 6 was waiting for more
    board = WandbBoard(tmp_path, CONFIG)
    for step in (4, 6, 8):  # from the checkpoint of step 2
        board.plot(step, {"train/loss": 1 / step})
    board.close()
    (name,) = {row[0] for row in rows}
    assert [row[1] for row in rows] == [2, 4, 6, 8, None]
    assert rows[0] == (name, 2, {"train/loss": 0.5, "samples": (8, 4, 3), "samples/text": "<pre>a &lt; b</pre>"})


def test_the_reporter_sends_what_tensorboard_gets(tmp_path, rows):
    reporter = Reporter(tmp_path, 0, config=CONFIG)
    reporter.record(4, {"loss": 1.0})
    reporter.plot(4, {"train/loss": 1.0})
    reporter.show(4, "samples", pictures={"": np.zeros((8, 4, 3), np.uint8), "more": np.zeros((2, 2, 3), np.uint8)}, texts={})
    reporter.close()
    assert rows[0][2] == {"train/loss": 1.0, "samples": (8, 4, 3), "samples/more": (2, 2, 3)}
    assert (tmp_path / "samples" / "step-000004.png").is_file()


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError, match=r"config\.wandb='project': .*pip install 'vlm_jax\[wandb\]'"):
        WandbBoard(tmp_path, CONFIG)
    Reporter(tmp_path, 0, config=tiny_run()).close()  # never imported otherwise


def test_offline_files_hold_every_step_once(tmp_path, monkeypatch):
    pytest.importorskip("wandb", reason="Weights & Biases is an optional extra")
    from wandb.proto import wandb_internal_pb2

    monkeypatch.setenv("WANDB_MODE", "offline")
    for steps in ((2, 4), (4, 6)):
        board = WandbBoard(tmp_path, CONFIG)
        for step in steps:
            board.plot(step, {"train/loss": 1 / step})
            board.show(step, pictures={"samples": np.zeros((8, 4, 3), np.uint8)}, texts={"samples": "text"})
        board.close()
        time.sleep(1)  # its folders are called by the second
    seen, names = [], set()
    for file in sorted((tmp_path / "wandb").glob("offline-run-*/*.wandb")):
        for data in records(file.read_bytes()):
            record = wandb_internal_pb2.Record.FromString(data)
            if record.WhichOneof("record_type") == "run":
                names.add((record.run.run_id, record.run.project))
            if record.WhichOneof("record_type") == "history":
                values = {item.nested_key[0] if item.nested_key else item.key: item.value_json for item in record.history.item}
                seen.append((record.history.step.num, json.loads(values["train/loss"]), "samples" in values))
    assert sorted(seen) == [(2, 0.5, True), (4, 0.25, True), (6, 1 / 6, True)]
    assert len(names) == 1 and names.pop()[1] == "project"
    assert list((tmp_path / "wandb").rglob("samples_*.png"))


def records(data):
    """Of a file in LevelDB's log format behind a header of 7 bytes."""
    place, whole = 7, b""
    while place + 7 <= len(data):
        if 32768 - place % 32768 < 7:  # a record's header does not cross blocks
            place += 32768 - place % 32768
            continue
        _, size, kind = struct.unpack_from("<IHB", data, place)
        whole += data[place + 7 : place + 7 + size]
        place += 7 + size
        if kind in (1, 4):  # whole, or the last part
            yield whole
            whole = b""
