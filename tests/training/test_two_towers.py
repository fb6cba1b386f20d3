"""A run of two towers: trained, evaluated, killed and resumed, loaded, exported."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from test_encoder_folders import two_towers
from torch_helpers import compare
from transformers import CLIPModel

import infer
import vlm_jax
from tests.tiny import tiny_run, write_data
from tests.training.pairs import CAPTIONS, get_config, pair_run, write_pairs
from vlm_jax.config import JsonLinesConfig, ParamRule, RetrievalConfig, RunConfig, ZeroShotConfig
from vlm_jax.config_dict import from_config_dict
from vlm_jax.encoders import Encoder
from vlm_jax.training.evaluators.retrieval import ranks_of
from vlm_jax.training.loop import train
from vlm_jax.training.sets import open_sets

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.usefixtures("runs_on_one_device")


def run_of(folder: Path) -> RunConfig:
    """Towers from nothing, evaluated in both ways; the labelled set is the pairs themselves."""
    config = from_config_dict(RunConfig, get_config())
    data = str(write_pairs(folder / "data"))
    source = JsonLinesConfig(train=data, eval=data)
    evaluators = (RetrievalConfig(every=4, at=(1, 3)), ZeroShotConfig(source=source, templates=("{}", "a {}")))
    return dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, source=source, cache_dir=str(folder / "cache")),
        evaluators=evaluators,
    )


def lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def trained(tmp_path_factory, runs_on_one_device):
    folder = tmp_path_factory.mktemp("towers")
    config = run_of(folder)
    return folder, config, train(config, folder / "run")


def test_what_a_run_reports(trained):
    folder, _, result = trained
    steps = [line for line in lines(folder / "run") if "scale" in line]
    assert [line["step"] for line in steps] == list(range(1, 9)) and all(line["pairs"] == 16 for line in steps)
    assert steps[0]["scale"] > 13 and steps[1]["scale"] == pytest.approx(10), "it is clipped after the first update"
    assert {"loss", "accuracy", "retrieval_text_at_1", "retrieval_image_at_3", "zero_shot_accuracy"} <= result.metrics.keys()
    assert result.metrics["pairs"] == len(CAPTIONS)


KILLED = """
import os, signal, sys
from pathlib import Path
from tests.training.test_two_towers import run_of
from vlm_jax.training import loop

flush = loop._Run._flush

def until(run, step):
    flush(run, step)
    if step == 6:
        run.checkpoints.wait()
        os.kill(os.getpid(), signal.SIGKILL)

loop._Run._flush = until
loop.train(run_of(Path(sys.argv[1])), sys.argv[2])
"""


@pytest.mark.thorough
def test_killed_it_goes_on_with_the_same_numbers(trained, tmp_path):
    """kill -9 in the midst of it, and the rest in this process."""
    folder, config, _ = trained
    command = [sys.executable, "-c", KILLED, str(folder), str(tmp_path)]
    flags = os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=1")
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]), "XLA_FLAGS": flags}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, timeout=240, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["2", "4"]
    assert lines(tmp_path)[-1]["step"] == 6, "two steps more than the checkpoint has"
    train(config, tmp_path)
    assert lines(tmp_path) == lines(folder / "run")


def test_a_run_is_an_encoder(trained, capsys):
    folder, config, _ = trained
    encoder = vlm_jax.load(folder / "run", rows=2)
    assert isinstance(encoder, Encoder) and config.data.tokens == encoder.processor.length
    pictures = [folder / "data" / f"{number}.png" for number in range(3)]
    images, texts = encoder.embed_images(pictures), encoder.embed_texts(CAPTIONS)
    scale = np.exp(float(encoder.params["logit_scale"]))
    chances = np.exp(scale * images @ texts.T)
    found = encoder.classify(pictures, CAPTIONS, "{}")
    np.testing.assert_allclose(found, chances / chances.sum(axis=1, keepdims=True), rtol=1e-4)
    infer.main([f"--checkpoint={folder / 'run'}", f"--image={pictures[0]}", "--classes=cat,dog"])
    assert sorted(line.split()[1] for line in capsys.readouterr().out.splitlines()) == ["cat", "dog"]


def test_a_published_pair_is_tuned_exported_and_read_again(tmp_path):
    """With the image tower locked, from features that are computed once."""
    two_towers(tmp_path / "published", "clip")
    config = pair_run(tmp_path, tmp_path / "published", rows=8, steps=2, eval_every=2)
    rules = (ParamRule(pattern="^image/encoder/", frozen=True),)
    config = dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, cache_features=True),
        optimizer=dataclasses.replace(config.optimizer, rules=rules),
    )
    train(config, tmp_path / "run")
    vlm_jax.api.export(tmp_path / "run", tmp_path / "exported")
    before, ours, again = (vlm_jax.load(tmp_path / name, dtype="float32") for name in ("published", "run", "exported"))
    pictures = [tmp_path / "data" / f"{number}.png" for number in range(3)]
    np.testing.assert_array_equal(again.embed_images(pictures), ours.embed_images(pictures))
    np.testing.assert_array_equal(again.embed_texts(CAPTIONS), ours.embed_texts(CAPTIONS))
    assert np.abs(ours.embed_texts(CAPTIONS) - before.embed_texts(CAPTIONS)).max() > 1e-3
    np.testing.assert_array_equal(ours.features(pictures), before.features(pictures))
    model, info = CLIPModel.from_pretrained(tmp_path / "exported", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    with torch.no_grad():
        theirs = model.eval().get_text_features(torch.tensor(ours.processor.tokens(CAPTIONS))).pooler_output
    compare(ours.embed_texts(CAPTIONS) * 17**0.5, torch.nn.functional.normalize(theirs, dim=-1) * 17**0.5)


def test_a_run_starts_from_another_of_the_same_tokenizer(trained):
    folder, config, _ = trained
    after = dataclasses.replace(config, init_from=str(folder / "run"))
    open_sets(after, folder / "after")
    other = dataclasses.replace(after.data, vocab_size=262)
    with pytest.raises(ValueError, match="trained with another tokenizer"):
        open_sets(dataclasses.replace(after, data=other), folder / "other")


def test_ranks_among_texts_and_images():
    """Two images share the first text; a tie counts as lost."""
    scores = np.array([[0.9, 0.1, 0.3], [0.2, 0.8, 0.1], [0.4, 0.5, 0.5]])
    ranks = ranks_of(scores, np.array([0, 0, 2]))
    assert ranks["text"].tolist() == [0, 1, 1]
    ranks = ranks_of(np.array([[0.3, 0.2], [0.6, 0.1], [0.7, 0.9]]), np.array([0, 0, 1]))
    assert ranks["image"].tolist() == [1, 0] and ranks["text"].tolist() == [0, 0, 0]


def test_evaluators_of_two_towers_refuse_other_runs(tmp_path):
    data = write_data(tmp_path / "data", 4)
    config = tiny_run(evaluators=(RetrievalConfig(),))
    source = JsonLinesConfig(train=str(data), eval=str(data))
    config = dataclasses.replace(
        config, data=dataclasses.replace(config.data, source=source, cache_dir=str(tmp_path / "cache"))
    )
    with pytest.raises(ValueError, match="retrieval is for two towers"):
        train(config, tmp_path / "run")
