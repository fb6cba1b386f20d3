"""Recall of rankings with ties and several right candidates."""

import numpy as np
import pytest

from vlm_jax.evaluation.retrieval import recall_at


def test_places_and_ties():
    scores = np.array([[3.0, 2.0, 1.0, 0.0], [3.0, 2.0, 1.0, 0.0], [5.0, 5.0 + 1e-6, 5.0, 0.0]])
    right = np.zeros_like(scores, bool)
    right[0, 0] = right[1, 2] = right[2, 0] = True
    found = recall_at(scores, right, (1, 2, 3))
    assert found == pytest.approx({"r1": (1 + 0 + 1 / 3) / 3, "r2": (1 + 0 + 2 / 3) / 3, "r3": 1.0})


def test_equal_scores_give_chance():
    assert recall_at(np.zeros((8, 8)), np.eye(8, dtype=bool)) == {"r1": 1 / 8, "r5": 5 / 8, "r10": 1.0}


def test_the_best_of_several_right_ones_counts_and_the_others_take_no_place():
    right = np.array([[True, False, True]])
    assert recall_at(np.array([[1.0, 2.0, 3.0]]), right, (1, 2)) == {"r1": 1.0, "r2": 1.0}
    assert recall_at(np.array([[1.0, 4.0, 3.0]]), right, (1, 2)) == {"r1": 0.0, "r2": 1.0}
