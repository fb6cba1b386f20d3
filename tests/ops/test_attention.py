"""Every kernel against `jax.nn.dot_product_attention`, with masks that are random intervals."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vlm_jax.ops import attention, attention_chunked, attention_dense
from vlm_jax.ops.masks import Mask, alibi_of, causal_mask

B, T, S, N, K, H = 2, 5, 7, 8, 2, 4
KERNELS = {"dense": attention_dense.attend, "chunked": attention_chunked.attend}


@pytest.fixture
def small_chunks(monkeypatch):
    """Chunks of 2 queries and 3 keys: several of each, and none of them whole at the end."""
    monkeypatch.setattr(attention_chunked, "QUERY_CHUNK", 2)
    monkeypatch.setattr(attention_chunked, "KEY_CHUNK", 3)


def inputs(kv_heads=K, seed=0, segments=True):
    """q, k, v, a mask in which every query sees something but not everything, and a bias."""
    rng = np.random.default_rng(seed)
    draw = lambda *shape: rng.standard_normal(shape).astype(np.float32)
    places = rng.permuted(np.tile(np.arange(S, dtype=np.int32), (B, 1)), axis=1)
    of_key = lambda at: np.take_along_axis(places, at, axis=1)
    seen = rng.integers(0, S, (B, T))
    first, last = of_key(seen) - rng.integers(0, 3, (B, T)), of_key(seen) + rng.integers(0, 3, (B, T))
    k_segments = rng.integers(0, 3, (B, S), dtype=np.int32)
    k_segments[np.arange(B)[:, None], seen] = np.maximum(k_segments[np.arange(B)[:, None], seen], 1)
    both = dict(q_segments=np.take_along_axis(k_segments, seen, axis=1), k_segments=k_segments) if segments else {}
    mask = Mask(places=places, first=first.astype(np.int32), last=last.astype(np.int32), **both)
    positions = rng.integers(0, 9, (B, T)), rng.integers(0, 9, (B, S))
    return draw(B, T, N, H), draw(B, S, kv_heads, H), draw(B, S, kv_heads, H), mask, alibi_of(*positions, N, 8.0)


def reference(q, k, v, mask, alibi):
    dense = np.asarray(mask.dense())
    assert dense.any(-1).all() and not dense.all()
    return jax.nn.dot_product_attention(q, k, v, bias=jnp.asarray(alibi.dense()), mask=jnp.asarray(dense)[:, None])


@pytest.mark.parametrize("segments", [True, False], ids=["segments", "one segment"])
@pytest.mark.parametrize("kv_heads", [N, K, 1])
@pytest.mark.parametrize("kernel", KERNELS)
def test_equals_jax_nn(kernel, kv_heads, segments, small_chunks):
    q, k, v, mask, alibi = inputs(kv_heads, segments=segments)
    attend = jax.jit(KERNELS[kernel])
    np.testing.assert_allclose(attend(q, k, v, mask, alibi), reference(q, k, v, mask, alibi), atol=1e-6)
    np.testing.assert_allclose(attend(q, k, v), jax.nn.dot_product_attention(q, k, v), atol=1e-6)


@pytest.mark.parametrize("kernel", KERNELS)
def test_gradients_equal_those_of_jax_nn(kernel, small_chunks):
    q, k, v, mask, alibi = inputs()
    slope = lambda fn: jax.jit(jax.grad(lambda *x: jnp.sum(jnp.sin(fn(*x))), argnums=(0, 1, 2)))(q, k, v)
    theirs = slope(lambda *x: reference(*x, mask, alibi))
    for ours, expected in zip(slope(lambda *x: KERNELS[kernel](*x, mask, alibi)), theirs, strict=True):
        np.testing.assert_allclose(ours, expected, atol=2e-6)


def test_the_weights_are_those_of_the_result():
    q, k, v, mask, alibi = inputs()
    weights = np.asarray(jax.jit(attention_dense.attention_weights)(q, k, mask, alibi))
    np.testing.assert_allclose(weights.sum(-1), 1, atol=1e-6)
    assert not weights[np.broadcast_to(~np.asarray(mask.dense())[:, None], weights.shape)].any()
    result = np.einsum("BNTS,BSNH->BTNH", weights, np.repeat(v, N // K, axis=2))
    np.testing.assert_allclose(jax.jit(attention_dense.attend)(q, k, v, mask, alibi), result, atol=1e-6)


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_query_that_sees_nothing_gets_exactly_0_and_finite_gradients(kernel, small_chunks):
    q, k, v, mask, alibi = inputs()
    first = np.array(mask.first)
    first[0, 2] = S  # behind every key
    blind = Mask(places=mask.places, first=first, last=mask.last, q_segments=mask.q_segments, k_segments=mask.k_segments)
    nobody = Mask(places=mask.places, first=first * 0 + S, last=mask.last)
    attend = KERNELS[kernel]
    y = np.asarray(jax.jit(attend)(q, k, v, blind, alibi))
    assert not y[0, 2].any() and np.isfinite(y).all() and y[0, 1].any()
    assert not np.asarray(jax.jit(attention_dense.attention_weights)(q, k, blind, alibi))[0, :, 2].any()

    @jax.jit
    def gradients(mask, scale):
        # A large cotangent everywhere, also where the result is 0.
        loss = lambda q, k, v: scale * jnp.sum(jnp.sin(attend(q, k, v, mask, alibi)))
        return jax.grad(loss, argnums=(0, 1, 2))(q, k, v)

    for scale in (1.0, 1e6):
        some = gradients(blind, scale)
        assert all(np.isfinite(gradient).all() and np.any(gradient) for gradient in some)
        assert not np.asarray(some[0])[0, 2].any()
        assert not any(np.any(gradient) for gradient in gradients(nobody, scale))


@pytest.mark.parametrize("kernel", KERNELS)
def test_large_logits_do_not_overflow(kernel, small_chunks):
    q, k, v, mask, _ = inputs()
    assert np.isfinite(np.asarray(jax.jit(KERNELS[kernel])(q * 1e4, k, v, mask))).all()


def test_long_rows_are_chunked_and_their_memory_does_not_grow_with_the_square():
    """A packed, causal row: what a training step keeps and makes on the way, from the compiled program."""

    def program(tokens):
        shape = lambda *sizes, dtype=jnp.float32: jax.ShapeDtypeStruct(sizes, dtype)
        ints = shape(1, tokens, dtype=jnp.int32)

        def loss(q, k, v, positions, segments):
            return jnp.sum(attention.attend(q, k, v, causal_mask(positions, positions, segments, segments)))

        args = (shape(1, tokens, 4, 16), shape(1, tokens, 2, 16), shape(1, tokens, 2, 16), ints, ints)
        return jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(*args).compile().memory_analysis().temp_size_in_bytes

    whole = 4096 * 4096 * 4 * 4  # the logits of 4 heads
    assert program(4096) < whole / 4
    assert program(8192) < 3 * program(4096)


def test_the_first_kernel_that_serves_is_taken(monkeypatch):
    calls = []
    q, k, v, mask, alibi = inputs()
    monkeypatch.setattr(attention_dense, "attend", lambda *args: calls.append("dense"))
    monkeypatch.setattr(attention_chunked, "attend", lambda *args: calls.append("chunked"))
    attention.attend(q, k, v, mask, alibi)
    monkeypatch.setattr(attention_dense, "MOST", T * S - 1)
    attention.attend(q, k, v, mask, alibi)
    assert calls == ["dense", "chunked"]
    assert "35 logits a head are more than 34" in attention_dense.unsupported_reason(q, k, v, mask, alibi)
