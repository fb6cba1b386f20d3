import jax
import jax.numpy as jnp
import pytest

from vlm_jax.training.flops import count_flops


def test_a_product_in_a_scan_counts_as_often_as_it_runs_and_three_times_with_its_gradient():
    weights, x = jax.ShapeDtypeStruct((5, 8, 8), jnp.float32), jax.ShapeDtypeStruct((4, 8), jnp.float32)

    def loss(weights, x):
        return jnp.sum(jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, weights)[0])

    once = 2 * 4 * 8 * 8
    assert count_flops(loss, weights, x) == 5 * once
    assert count_flops(jax.grad(loss, argnums=(0, 1)), weights, x) == 3 * 5 * once
    assert count_flops(jax.jit(jax.checkpoint(loss)), weights, x) == 5 * once


def test_a_loop_of_unknown_length_is_an_error():
    with pytest.raises(ValueError, match="while"):
        count_flops(lambda x: jax.lax.while_loop(lambda y: y[0] < 3, lambda y: y + 1, x), jnp.zeros(2))
