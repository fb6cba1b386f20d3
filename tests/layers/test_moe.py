"""Mixture of experts: against every expert computed for every token, under jit, scan and grad, and on a mesh."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.tiny import mesh_of, next_token_sums, random_batch, random_params, tiny_model
from vlm_jax.config import BlockConfig, ExpertsConfig, ModelConfig
from vlm_jax.layers.moe import MixtureOfExperts
from vlm_jax.models.vlm import VisionLanguageModel
from vlm_jax.ops.activations import ACTIVATIONS
from vlm_jax.ops.experts import route
from vlm_jax.sharding import Named, place_tree, shardings_of
from vlm_jax.training.flops import count_flops

ROWS, TOKENS = 8, 6


def block(number: int = 5, chosen: int = 2, **changes) -> BlockConfig:
    experts = ExpertsConfig(number=number, chosen=chosen)
    return dataclasses.replace(tiny_model().language.block, width=12, mlp_width=16, experts=experts, **changes)


def inputs(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((ROWS, TOKENS, 12)).astype(np.float32)


def params_of(config: BlockConfig):
    return random_params(MixtureOfExperts(config, jnp.float32), inputs())


def plain(config: BlockConfig, params, x):
    """Every expert for every token; those that were not chosen weigh nothing."""
    weights, numbers = route(x @ params["router"]["kernel"], config.experts.chosen)
    weight = jnp.sum(weights[..., None] * jax.nn.one_hot(numbers, config.experts.number), axis=-2)
    activation, experts = ACTIVATIONS[config.activation], params["experts"]
    hidden = jnp.einsum("BTD,EDF->BTEF", x, experts["up"])
    gate = lambda: jnp.einsum("BTD,EDF->BTEF", x, experts["gate"])
    hidden = hidden * activation(gate()) if config.gated_mlp else activation(hidden)
    return jnp.einsum("BTEF,EFD,BTE->BTD", hidden, experts["down"], weight)


def apply(config: BlockConfig, params, x):
    return MixtureOfExperts(config, jnp.float32).apply({"params": params}, x)[0]


def test_the_weights_of_the_chosen_add_up_to_one():
    logits = jnp.log(jnp.array([[0.1, 0.5, 0.3, 0.1]]))
    weights, numbers = route(logits, 2)
    np.testing.assert_array_equal(numbers, [[1, 2]])
    np.testing.assert_allclose(weights, [[5 / 8, 3 / 8]], rtol=1e-6)


@pytest.mark.parametrize(
    "config",
    [block(), block(number=3, chosen=3), block(number=4, chosen=1, gated_mlp=False, activation="relu")],
    ids=["two_of_five", "all", "one_of_four_ungated"],
)
def test_values_and_gradients_are_those_of_all_experts(config):
    params, x = params_of(config), inputs()
    loss = lambda fn: jax.jit(jax.value_and_grad(lambda p, x: jnp.sum(jnp.sin(fn(config, p, x))), argnums=(0, 1)))
    np.testing.assert_allclose(jax.jit(apply, static_argnums=0)(config, params, x), plain(config, params, x), atol=2e-4)
    ours, expected = loss(apply)(params, x), loss(plain)(params, x)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-3, rtol=1e-3), ours, expected)
    assert min(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(expected[1])) > 0.1 or config.experts.chosen == 1


def test_all_tokens_at_one_expert():
    config = block()
    params, x = params_of(config), np.abs(inputs())
    params["router"]["kernel"] = np.zeros((12, 5), np.float32)
    params["router"]["kernel"][:, 3] = 1.0
    _, numbers = route(x @ params["router"]["kernel"], 2)
    assert (numbers[..., 0] == 3).all()
    np.testing.assert_allclose(apply(config, params, x), plain(config, params, x), atol=2e-4)


@pytest.mark.parametrize("mesh", [(2, 2, 2), (1, 1, 8), (8, 1, 1)])
def test_a_mesh_gives_the_same_values_and_gradients(mesh):
    config = block()
    params, x, mesh = params_of(config), inputs(), mesh_of(*mesh)
    loss = jax.jit(jax.value_and_grad(lambda p, x: jnp.sum(jnp.sin(apply(config, p, x))), argnums=(0, 1)))
    expected = jax.tree.map(np.asarray, loss(params, x))
    boxed = jax.eval_shape(MixtureOfExperts(config, jnp.float32).init, jax.random.key(0), x)["params"]
    assert boxed["experts"]["gate"].names == ("experts", "embed", "mlp")
    with jax.set_mesh(mesh):
        placed = jax.device_put(params, shardings_of(place_tree(boxed, mesh), mesh))
        ours = loss(placed, x)
        # Seven rows do not divide: they are on every device.
        few = jax.jit(apply, static_argnums=0)(config, placed, x[:7])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-3, rtol=1e-3), ours, expected)
    np.testing.assert_allclose(few, plain(config, params, x[:7]), atol=2e-4)


def test_a_whole_model_on_a_mesh_scanned_and_rematerialised():
    language = tiny_model().language
    block = dataclasses.replace(language.block, experts=ExpertsConfig(number=4, chosen=2))
    language, batch = dataclasses.replace(language, block=block), random_batch()
    config = ModelConfig(vision=None, connector=None, fusion=None, language=language)
    params = random_params(VisionLanguageModel(config), batch)

    def gradients(remat):
        model = VisionLanguageModel(config, remat=remat)
        loss = lambda params: next_token_sums(model.apply({"params": params}, batch), batch)["loss"]
        return jax.jit(jax.value_and_grad(loss))(params)

    expected = gradients("none")
    with jax.set_mesh(mesh_of(2, 2, 2)):
        ours = gradients("dots")
    assert float(jnp.abs(expected[1]["language"]["layers"]["mlp"]["router"]["kernel"]).max()) > 0
    close = lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4 * float(jnp.abs(b).max()))
    jax.tree.map(close, ours, expected)


def test_tokens_are_not_gathered_over_the_mesh():
    config, mesh = block(), mesh_of(4, 1, 2)
    boxed = jax.eval_shape(MixtureOfExperts(config, jnp.float32).init, jax.random.key(0), inputs())["params"]
    shardings = shardings_of(place_tree(boxed, mesh), mesh)
    of = lambda box, sharding: jax.ShapeDtypeStruct(box.value.shape, box.value.dtype, sharding=sharding)
    abstract = jax.tree.map(of, boxed, shardings, is_leaf=lambda leaf: isinstance(leaf, Named))
    rows = jax.NamedSharding(mesh, jax.P(("data", "fsdp")))
    with jax.set_mesh(mesh):
        tokens = jax.ShapeDtypeStruct((ROWS, TOKENS, 12), jnp.float32, sharding=rows)
        text = jax.jit(lambda p, x: apply(config, p, x)).lower(abstract, tokens).compile().as_text()
    assert "all-reduce" in text and "all-gather" not in text and "all-to-all" not in text


def test_flops_are_those_of_the_chosen_on_any_mesh():
    config, tokens = block(), ROWS * TOKENS
    args = params_of(config), inputs()
    forward = lambda p, x: apply(config, p, x)
    summed = 2 * tokens * 2 * 12  # the weighted sum, which every slice of the experts makes of its own part
    counted = count_flops(forward, *args)
    assert counted == 2 * tokens * 12 * (5 + 3 * 16 * 2) + summed
    backward = count_flops(jax.grad(lambda p, x: jnp.sum(forward(p, x)), argnums=(0, 1)), *args)
    assert backward == 3 * counted
    with jax.set_mesh(mesh_of(2, 2, 2)):
        assert count_flops(forward, *args) == counted + summed
    with jax.set_mesh(mesh_of(1, 1, 3)):  # 16 is not divisible by 3: every device computes the whole
        assert count_flops(forward, *args) == counted


def test_biases_are_refused():
    with pytest.raises(ValueError, match="experts have no biases"):
        params_of(block(mlp_bias=True))
