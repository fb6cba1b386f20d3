"""Retrieval among all held-out pairs: recall at k (Radford et al. 2021, section E.2; Karpathy & Fei-Fei 2015)."""

from __future__ import annotations

import numpy as np

from vlm_jax.config import RetrievalConfig
from vlm_jax.training.evaluator import EVALUATORS, Evaluation, RunParts
from vlm_jax.training.step import TrainState
from vlm_jax.training.towers import Pictures, Towers

DIRECTIONS = ("text", "image")  # what is looked for


@EVALUATORS.add(RetrievalConfig)
class Retrieval:
    """`text_at_K`: the share of images whose caption is among the K likest; `image_at_K`: of captions, one of whose images is.

    A caption that several images have is one candidate.
    """

    def __init__(self, config: RetrievalConfig, parts: RunParts) -> None:
        """
        Raises:
          ValueError: the run has no two towers, or K is none.
        """
        if not config.at or min(config.at) < 1:
            raise ValueError(f"config.evaluators: {config.label}.at={config.at}: expected numbers from 1 on")
        self.at = config.at
        self.metrics = tuple(f"{what}_at_{k}" for what in DIRECTIONS for k in config.at)
        self._towers = Towers(parts.trainer, parts.processor, evaluator=config.label)
        self._pictures = Pictures(self._towers, [parts.held_out[index] for index in range(len(parts.held_out))])
        captions = self._pictures.captions
        self._texts = sorted(set(captions))
        self._own = np.searchsorted(self._texts, captions)  # of each image, its caption among them

    def evaluate(self, state: TrainState) -> Evaluation:
        images = self._pictures.embed(state)
        ranks = ranks_of(images @ self._towers.embed_texts(state, self._texts).T, self._own)
        metrics = {f"{what}_at_{k}": float(np.mean(ranks[what] < k)) for what in DIRECTIONS for k in self.at}
        recall = lambda what: " / ".join(f"{metrics[f'{what}_at_{k}']:.1%}" for k in self.at)
        count = {"text": len(self._texts), "image": len(images)}
        line = "; ".join(f"{what} found among {count[what]} at {self._said}: {recall(what)}" for what in DIRECTIONS)
        return Evaluation(metrics=metrics, line=line)

    @property
    def _said(self) -> str:
        return ", ".join(map(str, self.at))


def ranks_of(scores: np.ndarray, own: np.ndarray) -> dict[str, np.ndarray]:
    """How many candidates score as well as the right one or better, so 0 is the best.

    Args:
      scores: [images, texts]. own: [images], the text of each image.

    Returns:
      "text": [images]; "image": [texts], of the best of a text's images, its other images not counted.
    """
    right = own[:, None] == np.arange(scores.shape[1])[None]
    texts = np.sum((scores >= scores[right][:, None]) & ~right, axis=1)
    best = np.max(np.where(right, scores, -np.inf), axis=0)
    return {"text": texts, "image": np.sum((scores >= best[None]) & ~right, axis=0)}
