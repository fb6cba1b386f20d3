import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vlm_jax.ops.attention import attend, attention_weights

B, T, S, N, K, H = 2, 5, 7, 8, 2, 4


def inputs(kv_heads=K, seed=0):
    """q, k, v, a mask in which every query sees something, and a bias."""
    rng = np.random.default_rng(seed)
    draw = lambda *shape: rng.standard_normal(shape).astype(np.float32)
    mask = rng.random((B, T, S)) < 0.5
    mask[..., 3] = True
    return draw(B, T, N, H), draw(B, S, kv_heads, H), draw(B, S, kv_heads, H), mask, draw(B, N, T, S)


@pytest.mark.parametrize("kv_heads", [N, K, 1])
def test_equals_jax_nn(kv_heads):
    q, k, v, mask, bias = inputs(kv_heads)
    ours = jax.jit(attend)(q, k, v, mask, bias)
    expected = jax.nn.dot_product_attention(q, k, v, bias=jnp.asarray(bias), mask=jnp.asarray(mask)[:, None])
    np.testing.assert_allclose(ours, expected, atol=1e-6)
    np.testing.assert_allclose(jax.jit(attend)(q, k, v), jax.nn.dot_product_attention(q, k, v), atol=1e-6)


def test_grouped_queries_equal_repeated_heads():
    q, k, v, mask, bias = inputs()
    repeated = (np.repeat(x, N // K, axis=2) for x in (k, v))
    np.testing.assert_allclose(jax.jit(attend)(q, k, v, mask, bias), jax.jit(attend)(q, *repeated, mask, bias), atol=1e-6)


def test_the_weights_are_those_of_the_result():
    q, k, v, mask, bias = inputs()
    weights = np.asarray(jax.jit(attention_weights)(q, k, mask, bias))
    np.testing.assert_allclose(weights.sum(-1), 1, atol=1e-6)
    assert not weights[np.broadcast_to(~mask[:, None], weights.shape)].any()
    result = np.einsum("BNTS,BSNH->BTNH", weights, np.repeat(v, N // K, axis=2))
    np.testing.assert_allclose(jax.jit(attend)(q, k, v, mask, bias), result, atol=1e-6)


def test_a_query_that_sees_nothing_gets_exactly_0_and_finite_gradients():
    q, k, v, mask, bias = inputs()
    mask[0, 2] = False
    y = np.asarray(jax.jit(attend)(q, k, v, mask, bias))
    assert not y[0, 2].any() and np.isfinite(y).all() and y[0, 1].any()
    assert not np.asarray(jax.jit(attention_weights)(q, k, mask, bias))[0, :, 2].any()

    @jax.jit
    def gradients(mask, scale):
        # A large cotangent everywhere, also where the result is 0.
        loss = lambda q, k, v, bias: scale * jnp.sum(jnp.sin(attend(q, k, v, mask, bias)))
        return jax.grad(loss, argnums=(0, 1, 2, 3))(q, k, v, bias)

    for scale in (1.0, 1e6):
        some = gradients(mask, scale)
        assert all(np.isfinite(gradient).all() and np.any(gradient) for gradient in some)
        assert not np.asarray(some[0])[0, 2].any()
        assert not any(np.any(gradient) for gradient in gradients(np.zeros_like(mask), scale))


def test_gradients_equal_those_of_jax_nn():
    q, k, v, mask, bias = inputs()
    reference = lambda q, k, v: jax.nn.dot_product_attention(q, k, v, bias=jnp.asarray(bias), mask=jnp.asarray(mask)[:, None])
    slope = lambda fn: jax.jit(jax.grad(lambda *x: jnp.sum(jnp.sin(fn(*x))), argnums=(0, 1, 2)))(q, k, v)
    for ours, expected in zip(slope(lambda *x: attend(*x, mask, bias)), slope(reference), strict=True):
        np.testing.assert_allclose(ours, expected, atol=2e-6)


def test_large_logits_do_not_overflow():
    q, k, v, mask, _ = inputs()
    y = np.asarray(jax.jit(attend)(q * 1e4, k, v, mask))
    assert np.isfinite(y).all()
