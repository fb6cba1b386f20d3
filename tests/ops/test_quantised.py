import jax
import jax.numpy as jnp
import numpy as np

from vlm_jax.ops.quantised import dequantise, int8_product, quantise

RNG = np.random.default_rng(0)
KERNEL = RNG.standard_normal((2, 6, 3, 4)).astype(np.float32) * np.array([1, 100, 1e-3, 0.1], np.float32)


def test_every_output_has_a_scale_of_its_own_and_an_error_of_at_most_half_of_it():
    held, scale = quantise(KERNEL, (1,))
    assert held.dtype == jnp.int8 and scale.shape == (2, 1, 3, 4)
    np.testing.assert_array_less(np.abs(dequantise(held, scale) - KERNEL), np.broadcast_to(0.5001 * scale, KERNEL.shape))
    assert np.abs(np.asarray(held, int)).max(axis=1).min() == 127 and np.asarray(held).min() >= -127


def test_what_was_dequantised_is_quantised_to_the_same_and_zeros_stay_zeros():
    held, scale = quantise(KERNEL, (1,))
    again = quantise(dequantise(held, scale), (1,))
    np.testing.assert_array_equal(again[0], held)
    np.testing.assert_allclose(again[1], scale, rtol=1e-6)
    assert not dequantise(*quantise(jnp.zeros((2, 3)), (0,))).any()


def test_product_and_gradient():
    held, scale = quantise(KERNEL[0].reshape(6, 12), (0,))
    x, whole = RNG.standard_normal((5, 6)).astype(np.float32), dequantise(held, scale)
    ours = lambda x: jnp.sum(jnp.sin(int8_product(x, held, scale.reshape(-1))))
    plain = lambda x: jnp.sum(jnp.sin(x @ whole))
    np.testing.assert_allclose(jax.grad(ours)(x), jax.grad(plain)(x), rtol=1e-4, atol=1e-4)
    assert int8_product(x.astype(jnp.bfloat16), held, scale.reshape(-1)).dtype == jnp.bfloat16


def shapes_in(jaxpr):
    for eqn in jaxpr.eqns:
        yield from (var.aval.shape for var in eqn.outvars)
        for value in eqn.params.values():
            for part in value if isinstance(value, tuple | list) else (value,):
                if hasattr(inner := getattr(part, "jaxpr", part), "eqns"):
                    yield from shapes_in(inner)


def test_a_scan_keeps_no_floating_point_copy_of_the_stack_for_its_backward_pass():
    held, scale = quantise(RNG.standard_normal((7, 8, 8)), (1,))

    def loss(x):
        layer = lambda x, one: (jnp.tanh(int8_product(x, *one)), None)
        return jnp.sum(jax.lax.scan(layer, x, (held, scale.reshape(7, 8)))[0])

    made = set(shapes_in(jax.make_jaxpr(jax.grad(loss))(jnp.ones((3, 8))).jaxpr))
    assert (8, 8) in made and (7, 8, 8) not in made
