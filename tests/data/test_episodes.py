"""Episodes: examples of a source in a row."""

import dataclasses

import pytest

from tests.tiny import tiny_run, write_data
from vlm_jax.config import EpisodesConfig, JsonLinesConfig
from vlm_jax.data.example import SOURCES
from vlm_jax.data.sources.episodes import open_episodes
from vlm_jax.errors import DataError
from vlm_jax.processing.conversation import media_of


def opened(tmp_path, split="train", **settings):
    file = str(write_data(tmp_path / "data"))
    inner = JsonLinesConfig(train=file, eval=file)
    data = dataclasses.replace(tiny_run().data, source=EpisodesConfig(source=inner, **settings))
    return open_episodes(data, split), SOURCES[JsonLinesConfig](dataclasses.replace(data, source=inner), split)


def test_each_example_stands_once_in_an_order_with_its_own_picture(tmp_path):
    episodes, source = opened(tmp_path, examples=3, orders=2)
    per_order = len(source) // 3
    assert len(episodes) == 2 * per_order
    own = {}  # a picture -> the conversations about it, without the pictures' numbers
    for example in (source[index] for index in range(len(source))):
        own[example.media[0]] = {tuple(turn.text for turn in turns) for turns in example.conversations}
    orders = []
    for start in (0, per_order):
        pictures = []
        for index in range(start, start + per_order):
            (turns,) = episodes[index].conversations
            media = episodes[index].media
            assert media_of(turns) == [0, 1, 2] and len(media) == 3
            for place, picture in enumerate(media):
                asked, answer = turns[2 * place : 2 * place + 2]
                assert (asked.text, answer.text) in own[picture] and answer.learn and not asked.learn
            pictures += media
        assert len(set(pictures)) == len(pictures)
        orders.append(pictures)
    assert orders[0] != orders[1]


def test_the_held_out_examples_stay_single(tmp_path):
    held_out, source = opened(tmp_path, "eval", examples=3)
    assert held_out.fingerprint == source.fingerprint


def test_what_makes_no_episode_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"lower data\.source\.examples"):
        opened(tmp_path, examples=1000)
    with pytest.raises(DataError, match="numbers above 0"):
        opened(tmp_path, examples=0)
