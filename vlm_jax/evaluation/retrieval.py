"""Recall at k of a ranking: how often the right one is among the first k (image-text retrieval, Karpathy & Fei-Fei 2015)."""

from __future__ import annotations

import numpy as np

TIED = 1e-4  # scores that are nearer than that differ by rounding alone


def recall_at(scores: np.ndarray, right: np.ndarray, ks: tuple[int, ...] = (1, 5, 10)) -> dict[str, float]:
    """The share of queries with a right candidate among the first k, as `r1`, `r5`, `r10`.

    Ties are broken at random, and the expectation over that is what is returned: a model that gives all of 144 candidates the
    same score has an R@k of k / 144, wherever the right one stands. Of several right candidates the best one counts, and the
    others take no place.

    Args:
      scores: [queries, candidates], higher is better.
      right: [queries, candidates] bool, at least one a query.
    """
    scores = np.asarray(scores, np.float64)
    best = np.max(np.where(right, scores, -np.inf), axis=1, keepdims=True)
    above = np.sum(~right & (scores > best + TIED), axis=1)
    tied = 1 + np.sum(~right & (np.abs(scores - best) <= TIED), axis=1)
    return {f"r{k}": float(np.mean(np.clip((k - above) / tied, 0, 1))) for k in ks}
