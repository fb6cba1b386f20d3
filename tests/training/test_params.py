import jax.numpy as jnp
import numpy as np
import pytest

from vlm_jax.config import ParamRule
from vlm_jax.paths import by_path
from vlm_jax.training.params import held_boxes, merge, resolve, split, trained_rows

PARAMS = {"vision": {"kernel": jnp.ones((2, 3))}, "language": {"embedding": jnp.ones((4, 2)), "kernel": jnp.ones((2, 2))}}
PATHS = ["vision/kernel", "language/embedding", "language/kernel"]


def test_first_matching_rule_counts_and_the_rest_is_trained():
    rules = resolve(PATHS, (ParamRule(pattern="^vision", frozen=True), ParamRule(pattern="kernel", lr=0.5)))
    assert rules["vision/kernel"].frozen
    assert rules["language/kernel"].lr == 0.5 and not rules["language/kernel"].frozen
    assert rules["language/embedding"].lr == 1.0


def test_a_rule_that_matches_nothing_is_an_error_that_names_it():
    with pytest.raises(ValueError, match="visoin"):
        resolve(PATHS, (ParamRule(pattern="visoin", frozen=True),))


def test_split_and_merge_are_inverse():
    rules = resolve(PATHS, (ParamRule(pattern="^vision", frozen=True),))
    trained, frozen = split(PARAMS, rules)
    assert set(by_path(trained)) == {"language/embedding", "language/kernel"}
    assert set(by_path(frozen)) == {"vision/kernel"}
    assert by_path(merge(trained, frozen)).keys() == by_path(PARAMS).keys()


def test_frozen_parameters_may_be_held_in_bfloat16_and_trained_ones_are_not():
    rules = {frozen: ParamRule(pattern="", frozen=frozen, frozen_dtype="bfloat16") for frozen in (True, False)}
    held = {frozen: held_boxes("a", jnp.ones(1), rule)["a"].dtype for frozen, rule in rules.items()}
    assert held == {True: jnp.bfloat16, False: jnp.float32}


def test_trained_rows_keeps_only_the_new_rows():
    rules = resolve(PATHS, (ParamRule(pattern="embedding", rows_from=3),))
    cut = trained_rows(PARAMS, rules)
    np.testing.assert_array_equal(cut["language"]["embedding"], [[0, 0], [0, 0], [0, 0], [1, 1]])
    np.testing.assert_array_equal(cut["language"]["kernel"], PARAMS["language"]["kernel"])
