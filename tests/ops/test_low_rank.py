import jax
import jax.numpy as jnp
import numpy as np

from vlm_jax.ops.low_rank import low_rank

RNG = np.random.default_rng(0)


def test_it_is_the_product_with_the_whole_matrix():
    """Inputs and outputs of two axes, as those of attention's maps."""
    x, a, b = (RNG.standard_normal(shape).astype(np.float32) for shape in ((4, 12), (3, 4, 2), (2, 5, 2)))
    whole = np.einsum("NHR,RKJ->NHKJ", a, b).reshape(12, 10)
    np.testing.assert_allclose(low_rank(x, a, b, jnp.float32(0.5)), 0.5 * x @ whole, rtol=1e-5, atol=1e-5)


def test_dropout_leaves_out_the_share_and_grows_the_rest():
    x, identity = jnp.ones((200, 50)), jnp.eye(50)
    dropped = lambda key: low_rank(
        x, identity, identity, jnp.float32(1), {"key": jax.random.key(key), "rate": jnp.float32(0.2)}
    )
    made = np.asarray(dropped(0))
    assert set(np.unique(made.round(4))) == {0.0, 1.25} and abs((made == 0).mean() - 0.2) < 0.02
    np.testing.assert_array_equal(made, dropped(0))
    assert (made != dropped(1)).any()
