"""The picture of a run's learning curves: what is read for it, and when it is drawn."""

import json
import logging
import math

import numpy as np
import pytest
from PIL import Image

from tests.tiny import tiny_run
from vlm_jax.training import curves
from vlm_jax.training.curves import draw_curves, read_metrics, running_mean
from vlm_jax.training.report import Reporter


def write(path, steps):
    with path.open("w") as file:
        for step in range(1, steps + 1):
            training = {"step": step, "loss": None if step == 3 else 1 / step, "sequences": 8.0, "lr": 0.1}
            lines = [training]
            if step % 10 == 0:
                lines.append({"step": step, "eval_loss": 2 / step, "eval_accuracy": 0.5, "eval_sequences": 24.0 + step})
                lines.append({"step": step, "eval_samples_cider": 1.55 * step, "eval_samples_r1": step / 100})
            file.write("".join(json.dumps(line) + "\n" for line in lines))
        file.write('{"step": 99, "lo')  # killed while it wrote
    return path


def test_training_and_evaluations_are_read_apart(tmp_path):
    training, held_out = read_metrics(write(tmp_path / "metrics.jsonl", 30))
    steps, loss = training["loss"]
    assert len(steps) == 30 and math.isnan(loss[2]) and loss[3] == 0.25
    assert held_out[("loss",)]["loss"][1].tolist() == [0.2, 0.1, 2 / 30]
    panels = [names for names, _ in curves._panels(held_out)]
    assert panels == [["accuracy"], ["samples_r1"], ["samples_cider"]]  # the number of examples says nothing


def test_the_mean_has_no_bias_and_no_gaps():
    mean = running_mean(np.array([4.0, math.nan, 4.0, 4.0]), over=10)
    assert mean == pytest.approx([4.0] * 4)
    assert running_mean(np.array([1.0, 0.0]), over=2) == pytest.approx([1.0, 1 / 3])


def test_it_is_drawn_when_the_run_ends_and_only_of_a_curve(tmp_path, caplog):
    for steps, drawn in ((5, False), (30, True)):
        folder = tmp_path / str(steps)
        folder.mkdir()
        write(folder / "metrics.jsonl", steps)
        Reporter(folder, steps, config=tiny_run()).close()
        assert (folder / "curves.png").is_file() == drawn
    picture = np.asarray(Image.open(folder / "curves.png").convert("RGB"))
    blue = (picture[..., 2].astype(int) - picture[..., 0] > 60).sum(axis=1)  # the loss, in the first of the panels
    assert blue[: len(blue) // 5].sum() > 100
    assert not list(folder.glob("*.part*"))


def test_a_picture_that_cannot_be_drawn_ends_no_run(tmp_path, caplog, monkeypatch):
    write(tmp_path / "metrics.jsonl", 30)
    monkeypatch.setattr(curves, "running_mean", lambda *args, **named: 1 / 0)
    with caplog.at_level(logging.WARNING):
        Reporter(tmp_path, 30, config=tiny_run()).close()
    assert "curves.png could not be drawn: division by zero" in caplog.text


def test_long_runs_are_thinned_out(tmp_path):
    steps, values = curves._fewer(np.arange(10_001), np.arange(10_001))
    assert len(steps) <= curves.MOST + 1 and steps[-1] == values[-1] == 10_000
    draw_curves(write(tmp_path / "metrics.jsonl", 20), tmp_path / "curves.png")
