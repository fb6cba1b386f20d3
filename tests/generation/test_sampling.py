"""Sampling against the analytic distribution."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vlm_jax.generation.sampling import Sampling, keep_likeliest, sample

DRAWS = 20_000
PROBABILITIES = np.asarray([0.4, 0.1, 0.25, 0.05, 0.2])
LOGITS = np.log(PROBABILITIES).astype(np.float32)

draw = jax.jit(sample)


def settings(rows: int, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, first_seed: int = 0) -> Sampling:
    fill = lambda value, dtype: jnp.full(rows, value, dtype)
    seeds = jnp.arange(first_seed, first_seed + rows, dtype=jnp.uint32)
    return Sampling(
        fill(temperature, jnp.float32), fill(top_k, jnp.int32), fill(top_p, jnp.float32), jnp.ones(len(seeds)), seeds
    )


def frequencies(**changes) -> np.ndarray:
    tokens = draw(jnp.tile(LOGITS, (DRAWS, 1)), settings(DRAWS, **changes), 3)
    return np.bincount(np.asarray(tokens), minlength=5) / DRAWS


def expected(temperature: float = 1.0, keep=(0, 1, 2, 3, 4)) -> np.ndarray:
    weights = PROBABILITIES ** (1 / temperature)
    weights = np.where(np.isin(np.arange(5), keep), weights, 0)
    return weights / weights.sum()


@pytest.mark.parametrize(
    ("changes", "analytic"),
    [
        ({}, expected()),
        ({"temperature": 0.5}, expected(0.5)),
        ({"temperature": 2.0}, expected(2.0)),
        ({"top_k": 2}, expected(keep=(0, 2))),
        ({"top_p": 0.6}, expected(keep=(0, 2))),
        ({"top_p": 0.7}, expected(keep=(0, 2, 4))),
        ({"top_k": 3, "top_p": 0.5}, expected(keep=(0, 2))),  # of what top-k leaves, .47 .29 .24
        ({"temperature": 0.5, "top_p": 0.6}, expected(0.5, keep=(0, 2))),  # .56 .22 .14: temperature comes first
        ({"top_p": 1e-6}, expected(keep=(0,))),
    ],
    ids=str,
)
def test_frequencies(changes, analytic):
    found = frequencies(**changes)
    assert not found[analytic == 0].any()
    deviation = np.sqrt(analytic * (1 - analytic) / DRAWS)
    assert np.all(np.abs(found - analytic) <= 5 * deviation + 1e-9)


def test_greedy_is_the_likeliest_whatever_the_rest():
    assert frequencies(temperature=0.0, top_k=3, top_p=0.5)[0] == 1


def test_rows_of_different_settings_go_together():
    mixed = Sampling(
        jnp.asarray([0.0, 1.0] * 500),
        jnp.asarray([0, 2] * 500),
        jnp.ones(1000),
        jnp.ones(1000),
        jnp.arange(1000, dtype=jnp.uint32),
    )
    tokens = np.asarray(draw(jnp.tile(LOGITS, (1000, 1)), mixed, 0))
    assert set(tokens[::2]) == {0} and set(tokens[1::2]) == {0, 2}


def test_a_row_depends_on_its_seed_alone():
    logits = np.random.default_rng(0).normal(size=(16, 50)).astype(np.float32)
    whole = np.asarray(draw(logits, settings(16, first_seed=7), 2))
    assert np.array_equal(whole, np.asarray(draw(logits, settings(16, first_seed=7), 2)))
    alone = [int(draw(logits[row : row + 1], settings(1, first_seed=7 + row), 2)[0]) for row in range(16)]
    assert whole.tolist() == alone
    assert whole.tolist() != np.asarray(draw(logits, settings(16, first_seed=70), 2)).tolist()
    assert whole.tolist() != np.asarray(draw(logits, settings(16, first_seed=7), 3)).tolist()


def test_forbidden_tokens_and_ties():
    logits = jnp.asarray([[1.0, -jnp.inf, 1.0, 0.0, 1.0]])
    kept = lambda k, p: np.isfinite(np.asarray(keep_likeliest(logits, jnp.asarray([k]), jnp.asarray([p]))))[0].tolist()
    assert kept(0, 1.0) == [True, False, True, True, True]
    assert kept(5, 1.0) == [True, False, True, True, True]
    assert kept(2, 1.0) == [True, False, True, False, True]  # the three tie


def test_top_p_of_one_keeps_everything():
    logits = np.random.default_rng(1).normal(size=(1, 5000)).astype(np.float32) * 5
    assert np.isfinite(np.asarray(keep_likeliest(logits, jnp.asarray([0]), jnp.asarray([1.0])))).all()
