import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from tests.tiny import VOCAB, mesh_of, next_token_sums, random_batch, random_params, tiny_model
from vlm_jax.config import NextTokenConfig
from vlm_jax.config.block import ExpertsConfig
from vlm_jax.models.vlm import VisionLanguageModel
from vlm_jax.ops.experts import load_balance
from vlm_jax.ops.token_scores import scores_of
from vlm_jax.training.objectives.next_token import NextToken, chunked_scores

BATCH = random_batch()
LOGITS = jnp.asarray(np.random.default_rng(1).normal(size=(*BATCH.tokens.shape, VOCAB)), jnp.float32)
MEANS = NextToken(NextTokenConfig()).means


def test_loss_equals_torch_cross_entropy_over_the_weighted_tokens():
    logits, targets = torch.tensor(np.asarray(LOGITS)), torch.tensor(BATCH.targets).long()
    targets[torch.tensor(BATCH.weights) == 0] = -100
    expected = torch.nn.functional.cross_entropy(logits.reshape(-1, VOCAB), targets.reshape(-1)).item()
    np.testing.assert_allclose(MEANS(next_token_sums(LOGITS, BATCH))["loss"], expected, rtol=1e-6)


def test_a_batch_with_nothing_to_learn_from_gives_zero():
    nothing = dataclasses.replace(BATCH, weights=np.zeros_like(BATCH.weights))
    result = MEANS(next_token_sums(LOGITS, nothing))
    assert all(float(value) == 0 for value in result.values())
    assert NextToken(NextTokenConfig()).weight(nothing) == 1


def test_a_sequence_is_right_only_if_each_of_its_learned_tokens_is():
    targets = np.asarray(jnp.argmax(LOGITS, axis=-1)).astype(np.int32)
    weights = np.zeros_like(BATCH.weights)
    weights[0, [3, 4, 8, 9]] = 1  # both segments of the first row
    weights[1, [4, 9]] = 1
    targets[0, 9] += 1  # one wrong token in segment 2 of row 0
    targets[1, 2] += 1  # wrong, but nobody asked
    sums = next_token_sums(LOGITS, dataclasses.replace(BATCH, targets=targets, weights=weights))
    assert (float(sums["sequences"]), float(sums["right"]), float(sums["tokens_right"])) == (4, 3, 5)


# ---------------------------------------------------------------------------------------------------------------------
# Head and loss by chunks of tokens
# ---------------------------------------------------------------------------------------------------------------------

ROWS, TOKENS, WIDTH = 4, 11, 6
HIDDEN = np.random.default_rng(2).normal(size=(ROWS, TOKENS, WIDTH)).astype(np.float32)
KERNEL = np.random.default_rng(3).normal(size=(WIDTH, VOCAB)).astype(np.float32)
TARGETS = np.random.default_rng(4).integers(0, VOCAB, (ROWS, TOKENS))
TOKEN = 4 * ROWS * VOCAB  # bytes of a token's logits in every row


LEARNED = np.random.default_rng(6).random((ROWS, TOKENS)) < [[0.0], [0.3], [0.5], [1.0]]


def scored(hidden, kernel, most, *, learned=LEARNED):
    return chunked_scores(lambda x: x @ kernel, hidden, TARGETS, learned=learned, vocabulary=VOCAB, most=most)


@pytest.mark.parametrize("tokens", [1, 3, 4, 11, None])
def test_chunks_of_any_size_give_the_same_values_and_gradients(tokens):
    def expected(hidden, kernel):
        nll, hit = scores_of(hidden @ kernel, TARGETS)
        return nll * LEARNED, hit & LEARNED

    most = None if tokens is None else tokens * TOKEN
    for ours, whole in zip(jax.jit(lambda *args: scored(*args, most))(HIDDEN, KERNEL), expected(HIDDEN, KERNEL), strict=True):
        np.testing.assert_allclose(ours, whole, rtol=1e-5)
    slope = lambda fn: jax.jit(jax.grad(lambda *args: jnp.sum(jnp.sin(fn(*args)[0])), argnums=(0, 1)))(HIDDEN, KERNEL)
    for ours, whole in zip(slope(lambda *args: scored(*args, most)), slope(expected), strict=True):
        np.testing.assert_allclose(ours, whole, atol=1e-4)


@pytest.mark.parametrize(("most_learned", "chunks"), [(0, 0), (1, 1), (2, 1), (3, 2), (TOKENS, 6)])
def test_the_head_is_applied_to_chunks_with_something_to_learn_alone(most_learned, chunks):
    learned = np.zeros((ROWS, TOKENS), bool)
    learned[1, TOKENS - most_learned :] = True
    calls = []

    def head(x):
        jax.debug.callback(lambda: calls.append(x.shape[1]))
        return x @ KERNEL

    of = dict(learned=learned, vocabulary=VOCAB, most=TOKENS * TOKEN)
    jax.block_until_ready(jax.jit(lambda: chunked_scores(head, HIDDEN, TARGETS, **of))())
    jax.effects_barrier()
    assert calls == [2] * chunks


def logits_in(most):
    """How many numbers the largest array of vocabulary width has, forwards and backwards."""
    program = jax.make_jaxpr(jax.grad(lambda *args: jnp.sum(scored(*args, most)[0])))(HIDDEN, KERNEL)
    sizes = [0]

    def look(jaxpr):
        for eqn in jaxpr.eqns:
            sizes.extend(out.aval.size for out in eqn.outvars if out.aval.shape[-1:] == (VOCAB,) and out.aval.ndim > 2)
            for inner in jax.core.jaxprs_in_params(eqn.params):
                look(inner)

    look(program.jaxpr)
    return max(sizes)


def test_no_array_of_all_logits_is_made():
    assert logits_in(None) == ROWS * TOKENS * VOCAB
    assert logits_in(TOKEN) == ROWS * VOCAB
    assert logits_in(2 * TOKEN) == ROWS * 2 * VOCAB


def test_a_device_holds_its_own_rows_and_its_own_part_of_the_vocabulary():
    """On 2 x 4 devices an eighth of the logits lies on each, so that a quarter of a token's has room for two tokens."""
    assert logits_in(TOKEN // 4) == ROWS * VOCAB
    with jax.set_mesh(mesh_of(2, 1, 4)):
        assert logits_in(TOKEN // 4) == ROWS * 2 * VOCAB


# ---------------------------------------------------------------------------------------------------------------------
# The routers' balance: what layers tell comes out of the scan
# ---------------------------------------------------------------------------------------------------------------------


def test_the_balance_of_experts_is_that_of_transformers():
    logits = np.random.default_rng(5).normal(size=(3, *BATCH.tokens.shape, 4)).astype(np.float32)
    there = BATCH.segments > 0
    flat = tuple(torch.tensor(layer.reshape(-1, 4)) for layer in logits)
    expected = load_balancing_loss_func(flat, 4, 2, torch.tensor(there.astype(np.int64)))
    np.testing.assert_allclose(load_balance(logits, there, 2), expected.item(), rtol=1e-5)


def test_the_loss_of_the_routers_is_added_for_every_layer():
    config = tiny_model()
    block = dataclasses.replace(config.language.block, experts=ExpertsConfig(number=4, chosen=2), mlp_bias=False)
    language = dataclasses.replace(config.language, block=block)
    model = VisionLanguageModel(dataclasses.replace(config, vision=None, connector=None, fusion=None, language=language))
    params = random_params(model, BATCH)

    def of(params, share):
        sums = NextToken(NextTokenConfig(router_loss=share)).sums(model, params, BATCH)
        return sums["loss"], (sums, model.apply({"params": params}, BATCH, method="hidden")[1]["router_logits"])

    program = jax.jit(lambda params: (of(params, 0.0)[1], jax.grad(of, has_aux=True)(params, 0.5)))
    (plain, logits), (gradient, (with_routers, _)) = program(params)
    assert logits.shape == (config.language.layers, *BATCH.tokens.shape, 4)
    balance = load_balance(logits, BATCH.segments > 0, 2)
    np.testing.assert_allclose(with_routers["loss"], plain["loss"] + 0.5 * balance * plain["weight"], rtol=1e-5)
    np.testing.assert_allclose(MEANS(with_routers)["router_loss"], balance, rtol=1e-5)
    assert np.any(gradient["language"]["layers"]["mlp"]["router"]["kernel"])
