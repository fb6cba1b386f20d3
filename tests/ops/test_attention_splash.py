"""Splash attention, its kernel interpreted on the CPU, against the dense one."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.tiny import mesh_of
from vlm_jax.ops import attention, attention_cudnn, attention_dense, attention_splash
from vlm_jax.ops.masks import Mask, alibi_of, causal_mask, media_mask

B, T, N, K, H = 2, 150, 4, 2, 16


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Several blocks of queries and of keys, the last ones with padding."""
    monkeypatch.setattr(attention_splash, "BLOCK", 128)


def packed(window=None):
    """Two segments and padding in a row, three in the other."""
    segments = np.zeros((B, T), np.int32)
    for row, lengths in enumerate(((70, 60), (20, 90, 40))):
        starts = np.cumsum((0, *lengths))
        for number, (start, stop) in enumerate(itertools.pairwise(starts), 1):
            segments[row, start:stop] = number
    positions = np.stack([np.concatenate([np.arange((row == s).sum()) for s in dict.fromkeys(row)]) for row in segments])
    positions = positions.astype(np.int32)
    return causal_mask(positions, positions, segments, segments, window, same_tokens=True)


def some_keys():
    return Mask.from_keys(jnp.asarray(np.random.default_rng(1).random((B, T)) < 0.6))


def media():
    """Three media of 50 visual tokens; a token sees the last one, and the first tokens see none."""
    last = np.repeat(np.arange(4), 40)[None, :T].repeat(B, axis=0).astype(np.int32)
    return media_mask(last, last, 3, "last", tokens=50)


MASKS = {"causal": packed, "window": functools.partial(packed, 33), "keys": some_keys, "media": media, "none": lambda: None}


def drawn(seed=0):
    rng = np.random.default_rng(seed)
    return [rng.standard_normal((B, T, heads, H)).astype(np.float32) for heads in (N, K, K)]


@pytest.mark.parametrize("name", MASKS)
def test_equals_the_dense_one_and_so_do_the_gradients(name):
    mask, qkv = MASKS[name](), drawn()
    kernel = functools.partial(attention_splash.attend, mask=mask, interpret=True)
    dense = functools.partial(attention_dense.attend, mask=mask)
    of = lambda fn: jax.jit(jax.value_and_grad(lambda *x: jnp.sum(jnp.sin(fn(*x))), argnums=(0, 1, 2)))(*qkv)
    np.testing.assert_allclose(jax.jit(kernel)(*qkv), jax.jit(dense)(*qkv), atol=2e-5)
    for ours, theirs in zip(jax.tree.leaves(of(kernel)), jax.tree.leaves(of(dense)), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=5e-5, rtol=1e-5)


def test_on_a_mesh_every_device_has_its_rows_and_heads():
    qkv, mask = drawn(), packed()
    mesh = mesh_of(2, 1, 2)
    expected = jax.jit(attention_dense.attend)(*qkv, mask)
    with jax.set_mesh(mesh):
        run = jax.jit(functools.partial(attention_splash.attend, interpret=True))
        np.testing.assert_allclose(run(*qkv, mask), expected, atol=2e-5)


def test_what_it_does_not_serve_says_why(monkeypatch):
    q, k, v = drawn()
    positions = np.arange(T, dtype=np.int32)[None].repeat(B, axis=0)
    ones = np.ones_like(positions)
    causal = functools.partial(causal_mask, positions, positions, ones, ones, same_tokens=True)
    assert "it runs on TPUs, and the mesh is of cpu" in attention_splash.unsupported_reason(q, k, v, packed(), None)
    assert "it runs on GPUs, and the mesh is of cpu" in attention_cudnn.unsupported_reason(q, k, v, packed(), None)
    monkeypatch.setattr(attention_splash, "target_platform", lambda: "tpu")
    why = lambda mask, alibi=None: attention_splash.unsupported_reason(q, k, v, mask, alibi)
    assert "150 keys are fewer than 512" in why(packed())
    monkeypatch.setattr(attention_splash, "LEAST", 1)
    assert why(packed()) == why(packed(33)) == why(some_keys()) == why(media()) == why(None) == ""
    assert "linear biases" in why(packed(), alibi_of(positions, positions, N, 8.0))
    for mask in (causal(jnp.asarray(5)), causal(q_prefix_end=positions), causal(q_prefix_segments=ones)):
        assert "a mask that is known from arrays alone" in why(mask)
    with jax.set_mesh(mesh_of(1, 1, 4)):
        assert "2 kv_heads do not divide into tensor=4 shards" in why(packed())
    calls = []
    monkeypatch.setattr(attention_splash, "attend", lambda *args: calls.append("splash"))
    attention.attend(q, k, v, packed())
    assert calls == ["splash"]
