"""Layers held one by one, programs compiled a layer at a time: the same answers, and nothing that grows with depth."""

import dataclasses

import generation_helpers as tiny
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_decode import NEW, requests

from tests.tiny import thorough
from vlm_jax.config import MeshConfig
from vlm_jax.config.generation import Settings
from vlm_jax.generation.attention_map import attention_maps
from vlm_jax.generation.by_layer import Pieces, restack_layers, split_layers
from vlm_jax.layers.stack import piece


def apart_and_whole(config, mesh=None):
    """A generator that holds layers one by one, and one that does not."""
    whole = tiny.generator(config)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("vlm_jax.generation.by_layer.LEAST", 0)
        patch.setattr("vlm_jax.generation.programs.WHOLE", 0)
        apart = tiny.new_generator(config, mesh)
    assert apart.programs.in_pieces and not whole.programs.by_layer
    return apart, whole


@pytest.mark.parametrize("beams", [1, thorough(2)])
def test_the_same_tokens_on_a_mesh(beams):
    apart, whole = apart_and_whole(tiny.model_config(), MeshConfig(data=2, fsdp=2, tensor=2))
    jax.tree.map(np.testing.assert_array_equal, apart.params, whole.params)
    settings = Settings(max_new_tokens=NEW, beams=beams)
    expected = [answer.tokens for answer in whole.generate(requests(), settings)]
    assert [answer.tokens for answer in apart.generate(requests(), settings)] == expected
    assert "".join(apart.stream(requests()[0], Settings())) == whole.generate(requests()[:1])[0].text
    answer = whole.generate(requests(), Settings(max_new_tokens=NEW))[2]
    maps = [attention_maps(generator, requests()[2], answer).maps for generator in (whole, apart)]
    np.testing.assert_allclose(*maps, atol=1e-5)


def test_as_many_programs_for_any_depth_and_each_layer_its_own_window(monkeypatch):
    monkeypatch.setattr("vlm_jax.layers.stack.UNROLL", 2)
    for windows in ((4, None), (4, None, 2, None, 4, 3)):
        config = tiny.model_config(layers=len(windows))
        config = dataclasses.replace(config, language=dataclasses.replace(config.language, window=windows))
        apart, whole = apart_and_whole(config)
        found = apart.generate(requests(), Settings(max_new_tokens=NEW))
        if len(windows) > 2:
            expected = whole.generate(requests(), Settings(max_new_tokens=NEW))
            assert [answer.tokens for answer in found] == [answer.tokens for answer in expected]
        # What stands before the layers, a gated layer with two others, and what follows.
        assert [program._cache_size() for program in apart.programs.by_function.values()] == [3, 3]


def test_memory_is_reused_only_where_nothing_else_reads_it():
    """The state is donated, the parameters and what is handed on are not."""

    def fn(params, state, kept):
        x, out = state["x"], []
        layer = piece(lambda x, pair: (x * 2 + pair[0], pair[1] + x))
        for scale, cache in zip(params, state["caches"], strict=True):
            x, cache = layer(x, (scale, cache))
            out.append(cache)
        return {"x": x, "caches": out}, kept, state["x"] + 1

    params, kept = [jnp.ones(4, jnp.float32), jnp.full(4, 3, jnp.float32)], jnp.arange(4.0)
    state = {"x": jnp.arange(4.0), "caches": [jnp.zeros(4), jnp.ones(4)]}
    expected = jax.jit(fn)(params, state, kept)
    pieces, caches = Pieces(fn, donate_argnums=(1,)), state["caches"]
    found = pieces(params, state, kept)
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    assert all(cache.is_deleted() for cache in caches)
    assert not any(x.is_deleted() for x in (*params, kept))
    again = pieces(params, found[0], kept)
    jax.tree.map(np.testing.assert_array_equal, again, jax.jit(fn)(params, expected[0], kept))
    assert pieces._cache_size() == 2  # a layer, and what follows


def test_a_fusion_without_layers_is_left_as_it_is():
    """LLaVA-NeXT's has a newline and nothing else."""
    stack = jnp.arange(6.0).reshape(3, 2)
    params = {"language": {"layers": {"a": jnp.array(stack), "b": jnp.array(stack)}}, "fusion": {"newline": jnp.ones(2)}}
    apart = split_layers(params)
    assert [layer["a"].tolist() for layer in apart["language"]["layers"]] == stack.tolist()
    assert apart["fusion"] is params["fusion"]
    np.testing.assert_array_equal(restack_layers(apart)["language"]["layers"]["b"], stack)
