"""Features of a frozen vision encoder, computed once: the same run as with pixels."""

import dataclasses
import logging
import os
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from PIL import Image

from tests.tiny import mesh_of, tiny_run, write_data
from vlm_jax.config import AugmentConfig, JsonLinesConfig, ParamRule
from vlm_jax.data import features as store_of_features
from vlm_jax.data.pipeline import build_source, eval_batches
from vlm_jax.errors import DataError
from vlm_jax.training.checkpoint import load_run
from vlm_jax.training.features import features_of
from vlm_jax.training.loop import train
from vlm_jax.training.processors import build_processor
from vlm_jax.training.step import Trainer


def run_of(folder, **changes):
    """A tiny run with a frozen vision encoder."""
    data = str(folder / "data" / "data.jsonl")
    base = tiny_run(steps=4, save_every=2, eval_every=4)
    rules = (ParamRule(pattern="^vision", frozen=True),)
    settings = dict(source=JsonLinesConfig(train=data, eval=data), cache_dir=str(folder / "cache")) | changes
    return dataclasses.replace(
        base,
        data=dataclasses.replace(base.data, **settings),
        optimizer=dataclasses.replace(base.optimizer, rules=rules),
    )


@pytest.fixture
def folder(tmp_path):
    write_data(tmp_path / "data", examples=8)
    return tmp_path


def opened(config, workdir):
    """(source, processor, store's arguments) of a run that was trained."""
    source = build_source(config.data, "eval")
    return build_processor(config.data, source, workdir), source


def test_a_run_on_features_is_the_run_on_pixels(folder, caplog, monkeypatch, runs_on_one_device):
    caplog.set_level(logging.INFO, "vlm_jax")
    config = run_of(folder, cache_features=True)
    found = train(config, folder / "run").metrics
    assert "features of 8 examples" in caplog.text
    processor, source = opened(config, folder / "run")
    mesh = mesh_of(1, 1, 1)
    with jax.set_mesh(mesh):
        on_pixels = dataclasses.replace(config, data=dataclasses.replace(config.data, cache_features=False))
        trainer = Trainer(on_pixels, mesh)
        state = trainer.state_of(load_run(folder / "run", mesh).params)
        batches = map(trainer.put, eval_batches(config.data, processor, source))
        pixels = [jax.device_get(trainer.eval_step(state, batch)) for batch in batches]
        expected = trainer.objective.means({name: sum(sums[name] for sums in pixels) for name in pixels[0]})
        assert expected.keys() == found.keys()
        for name, value in expected.items():
            np.testing.assert_allclose(found[name], value, rtol=1e-4, err_msg=name)

        made, builder = [], store_of_features._Builder
        monkeypatch.setattr(store_of_features, "_Builder", lambda *args: made.append(args) or builder(*args))
        features = features_of(trainer, state, source, processor=processor)
        assert not made, "they are on disk"
        later = dataclasses.replace(state, trained=jax.tree.map(lambda x: x + 1, state.trained))
        features_of(trainer, later, source, processor=processor)
        assert not made, "a frozen encoder is the same at every step"
        features_of(trainer, jax.tree.map(lambda x: x + 1, state), source, processor=processor)
        assert made, "another encoder has other features"
    picture = next((folder / "data").glob("*.png"))
    Image.new("RGB", (33, 20), "red").save(picture)
    with pytest.raises(DataError, match=r"\.png was changed since it was tokenised"):
        list(eval_batches(config.data, processor, source, features=features))


def test_what_cannot_be_cached_is_refused(folder):
    trained = dataclasses.replace(run_of(folder, cache_features=True), optimizer=tiny_run().optimizer)
    with pytest.raises(ValueError, match=r"the vision encoder is trained \(vision/"):
        train(trained, folder / "run")
    with pytest.raises(ValueError, match="augmented pictures always differ"):
        train(run_of(folder, cache_features=True, augment=AugmentConfig(shift=1)), folder / "augmented")


class Interruption(Exception):
    pass


# Five examples: two media, one, none, a broken one, one of three tiles, of which the second was there before.
STORE = SimpleNamespace(
    meta={"content": 7},
    example_media=np.array([2, 1, 0, 1, 1]),
    slots=np.array([2, 1, 0, 1, 3]),
    media_offsets=np.array([0, 2, 3, 3, 4, 5]),
)


def tiles_of(example):
    if example == 3:
        raise store_of_features.ImageError("broken")
    tile = lambda value: np.full((2, 2, 3), value, np.uint8)
    return {0: [[tile(1)], [tile(2)]], 1: [[tile(3)]], 4: [[tile(4), tile(1), tile(6)]]}[example]


def encode(images):
    """[B, 2, 2, 3] -> [B, 1, 2]"""
    return np.stack([images[:, 0, 0, :2]], axis=1) * 0.5


def built(folder, seen=tiles_of, **changes):
    return store_of_features.feature_store(
        folder, STORE, **dict(key=("encoder",), tiles_of=seen, encode=encode, rows=2) | changes
    )


def values(store, example):
    return [[float(tile[0, 0]) * 2 for tile in tiles] for tiles in store.of(example)]


def test_tiles_of_each_medium_and_what_was_left_out(tmp_path):
    store = built(tmp_path)
    assert [values(store, example) for example in (0, 1, 2, 4)] == [[[1], [2]], [[3]], [], [[4, 1, 6]]]
    assert store.shape == (1, 2)
    assert (store.folder / "features.bin").stat().st_size == 5 * 2 * 4, "equal tiles are encoded once"
    with pytest.raises(store_of_features.ImageError, match="could not be used"):
        store.of(3)
    assert built(tmp_path, key=("another",)).folder != store.folder
    with (store.folder / "features.bin").open("r+b") as file:
        file.write(b"\1")
    with pytest.raises(DataError, match="is damaged: remove it"):
        built(tmp_path)


def test_an_interrupted_build_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(store_of_features, "SAVE_S", 0.0)

    def interrupted(example):
        if example == 4:
            raise Interruption
        return tiles_of(example)

    with pytest.raises(Interruption):
        built(tmp_path, interrupted)
    asked = []
    store = built(tmp_path, lambda example: asked.append(example) or tiles_of(example))
    assert 0 not in asked and [values(store, example) for example in (0, 1, 4)] == [[[1], [2]], [[3]], [[4, 1, 6]]]
    assert (store.folder / "features.bin").stat().st_size == 5 * 2 * 4, "also those of before"
    assert not any(name.endswith(".part") for name in os.listdir(tmp_path))


def test_what_is_saved_on_the_way_costs_no_batch(tmp_path, monkeypatch):
    monkeypatch.setattr(store_of_features, "SAVE_S", 0.0)
    batches = []
    built(tmp_path, encode=lambda images: batches.append(images) or encode(images), rows=4)
    assert len(batches) == 2, "five distinct tiles"
