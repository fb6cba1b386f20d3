"""Sample answers on a sheet, and a whole run that is watched."""

import json
import re

import jax
import numpy as np
import pytest
from evaluator_helpers import CAPTIONS, known, run_of
from PIL import Image

from vlm_jax.config import GenerationConfig, RankingConfig, RunConfig, SamplesConfig
from vlm_jax.config_dict import from_dict, to_dict
from vlm_jax.evaluate import evaluate
from vlm_jax.training.evaluators import samples
from vlm_jax.training.evaluators.samples import MARGIN, WIDTH, Sample, Samples, draw, markdown
from vlm_jax.training.loop import train

RED = np.full((20, 30, 3), (255, 0, 0), np.uint8)


def test_a_run_is_watched(tmp_path, capfd, runs_on_one_device):
    watched = (
        GenerationConfig(every=10, rows=8, max_new_tokens=4),
        RankingConfig(rows=8, captions=3, name="captions"),
        SamplesConfig(every=20, examples=4, max_new_tokens=4),
    )
    settings = dict(steps=20, eval_every=20, save_every=10, keep_last=1, log_every=10, best_by="generation_exact_match")
    config = run_of(tmp_path, evaluators=watched, **settings)
    result = train(from_dict(RunConfig, json.loads(json.dumps(to_dict(config)))), tmp_path / "run")
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "eval_generation_exact_match" in line] == [10, 20]
    assert {"captions_r1", "captions_prior_r10", "generation_exact_match", "accuracy"} <= result.metrics.keys()
    assert result.metrics["captions_r5"] == 1  # of three captions
    sheet = np.asarray(Image.open(tmp_path / "run" / "samples" / "step-000020.png"))
    assert sheet.shape[1] == round(3 * WIDTH * 100) and (tmp_path / "run" / "curves.png").is_file()
    output = capfd.readouterr().out
    again = evaluate(tmp_path / "run", ["captions", "ranking:captions=3,rows=8,blank=True"], mesh="data=8")
    assert again["captions_prior_r1"] == result.metrics["captions_prior_r1"] and again["step"] == 20
    assert again["ranking_r1"] == pytest.approx(1 / 3)
    assert re.search("samples: [0-4] of 4 sample answers are right", output) and "3 pictures, 3 captions" in output


def sample(**changes):
    return Sample(**dict(pictures=[RED], question="which colour?", truth="red", answer="red", right=True) | changes)


def test_every_panel_has_its_picture_and_its_text_below():
    sheet = draw([sample(), sample(answer="blue", right=False), sample(pictures=[RED, RED]), sample(pictures=[])])
    width = round(WIDTH * 100)
    red = (sheet == (255, 0, 0)).all(axis=-1)
    columns = [red[:width, place * width : (place + 1) * width] for place in range(3)]
    assert all(column.sum() > 0.2 * width**2 for column in columns)
    assert not columns[2].all(axis=0).any() and (columns[2].sum(axis=0) == 0).sum() > 2 * MARGIN * 100  # a gap between two
    assert not red[width:].any()
    inked = lambda part: (part < 250).any(axis=-1).any()
    assert inked(sheet[width : width + 60]) and not inked(sheet[:, width - 8 : width])


@pytest.mark.parametrize("text", ["i" * 500, "W" * 500, "$5 and $6 " * 40])
def test_long_texts_stay_within_their_panel(text):
    sheet = draw([sample(question=text, truth=text, answer=text), sample(pictures=[], question="", truth="", answer=" ")])
    width = round(WIDTH * 100)
    assert (sheet[:, width - 6 : width] > 250).all()
    assert len(samples._lines(sample(question=text, truth=text, answer=text), samples._measure())) == 3 * samples.MOST_LINES


def test_the_sheet_and_the_table_say_what_was_answered(folder, monkeypatch):
    parts, state = known(folder, in_sequence=False, mesh=(1, 1, 1))
    drawn = []
    monkeypatch.setattr(samples, "draw", lambda some: drawn.extend(some) or RED)
    with jax.set_mesh(parts.trainer.mesh):
        found = Samples(SamplesConfig(examples=3, max_new_tokens=8), parts).evaluate(state)
    assert [one.truth for one in drawn] == [CAPTIONS[0], CAPTIONS[6], CAPTIONS[1]] and drawn[0].pictures[0].shape == (16, 16, 3)
    assert found.metrics == {} and found.texts[""].splitlines()[2].startswith(f"|  | {CAPTIONS[0]} | ")


def test_cells_of_the_table_are_escaped():
    assert markdown([sample(answer="a|b\nc", right=False)]).splitlines()[2] == r"| which colour? | red | a\|b c |  |"
