"""Attention rollout by hand, and maps of a whole answer."""

import dataclasses

import generation_helpers as tiny
import numpy as np
import pytest
from PIL import Image

from vlm_jax.config import MlpProjectorConfig
from vlm_jax.config.generation import Settings
from vlm_jax.errors import RequestError
from vlm_jax.generation.attention_map import attention_maps, check_visible, group_words, rollout
from vlm_jax.generation.attention_picture import against_even, blend


def test_one_layer_is_its_look_at_the_features():
    weights = np.asarray([[[0.2, 0.3, 0.1, 0.4], [0.0, 0.5, 0.5, 0.0]]], np.float32)  # 2 latents, 2 patches
    np.testing.assert_allclose(rollout(weights), [[0.4, 0.6], [0.0, 1.0]], atol=1e-6)


def test_what_latents_tell_each_other_is_followed():
    first = [[1.0, 0.0, 0.0, 0.0], [0.0, 1.0, 0.0, 0.0]]  # each latent looks at its patch
    second = [[0.0, 0.0, 0.0, 1.0], [0.5, 0.0, 0.0, 0.5]]  # the first asks the second, which looks at patch 0 and itself
    # first: .5 (1, 0) + .5 (0, 1); second: .5 (0, 1) + .5 ((.5, 0) + .5 (0, 1))
    np.testing.assert_allclose(rollout(np.asarray([first, second], np.float32)), [[0.5, 0.5], [0.25, 0.75]], atol=1e-6)


def test_latents_that_see_nothing_stay_empty():
    weights = np.zeros((2, 2, 5), np.float32)
    weights[..., 3:] = 0.5
    assert not np.asarray(rollout(weights)).any()


@pytest.mark.parametrize(
    "variant",
    [{}, {"class_token": "kept"}, {"class_token": "kept", "registers": 2, "keep_registers": True}],
    ids=["patches", "class token", "registers"],
)
def test_maps_of_an_answer(tmp_path, variant):
    generator = tiny.generator(tiny.model_config(**variant))
    request = tiny.ask("is <image> or <image> a circle?", [tiny.picture(1), tiny.picture(2)])
    answer = generator.generate([request], Settings(max_new_tokens=8))[0]
    maps = attention_maps(generator, request, answer)
    assert maps.maps.shape == (len(maps.words), 2, 4, 4)
    np.testing.assert_allclose(maps.maps.sum(axis=(1, 2, 3)), 1, atol=1e-5)
    assert not maps.maps[:, 0].any()  # a token sees the last image alone
    assert maps.maps[:, 1].std() > 0
    assert np.array_equal(maps.pictures[1], tiny.picture(2))
    maps.save(tmp_path / "looks.png")
    with Image.open(tmp_path / "looks.png") as picture:
        assert min(picture.size) > 200
    with pytest.raises(RequestError, match="needs a picture"):
        attention_maps(generator, tiny.ask("what?"), answer)


def test_tokens_of_a_word_are_merged():
    class Pieces:
        def decode(self, ids, special=True):
            return "".join([" r", "ed", " tri", "angle", "s", "."][i] for i in ids)

    assert group_words(Pieces(), list(range(6))) == (["red", "triangles."], [range(0, 2), range(2, 6)])
    assert group_words(Pieces(), []) == ([], [])


def test_colours_are_against_an_even_look():
    maps = np.zeros((1, 2, 2, 2))  # a word that sees the second picture alone
    maps[0, 1] = [[0.5, 0.25], [0.125, 0.125]]
    np.testing.assert_allclose(against_even(maps)[0, 1], [[1, 0], [-1, -1]])
    picture = np.full((4, 4, 3), 128, np.uint8)
    red, none, blue = (blend(picture, np.full((2, 2), level))[0, 0].astype(int) for level in (1.0, 0.0, -1.0))
    assert red[0] > red[2] + 80 and blue[2] > blue[0] + 80 and none.tolist() == [128] * 3
    assert blend(picture, None).max() < 64


def test_a_connector_without_attention_is_refused_before_an_answer():
    config = tiny.model_config()
    generator = tiny.generator(
        dataclasses.replace(config, connector=MlpProjectorConfig(width=32, activation="gelu", bias=True))
    )
    with pytest.raises(RequestError, match="need a connector that attends: an MLP projector"):
        check_visible(generator, tiny.ask("what?", [tiny.picture(1)]))
