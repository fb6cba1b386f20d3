"""Zero-shot classification (Radford et al. 2021, section 3.1): the class whose name is likest to the image."""

from __future__ import annotations

import dataclasses

import numpy as np

from vlm_jax.config import ZeroShotConfig
from vlm_jax.data.pipeline import build_source
from vlm_jax.training.evaluator import EVALUATORS, Evaluation, RunParts
from vlm_jax.training.step import TrainState
from vlm_jax.training.towers import Pictures, Towers


@EVALUATORS.add(ZeroShotConfig)
class ZeroShot:
    """`accuracy`. A class is the mean of the vectors of its name in every template (section 3.1.4)."""

    metrics = ("accuracy",)

    def __init__(self, config: ZeroShotConfig, parts: RunParts) -> None:
        """
        Raises:
          ValueError: the run has no two towers, or a template has no place for a name; DataError: the set cannot be read.
        """
        wrong = [template for template in config.templates if "{}" not in template]
        if wrong or not config.templates:
            raise ValueError(f"config.evaluators: {config.label}.templates={config.templates}: expected {{}} in each")
        self._templates = config.templates
        self._towers = Towers(parts.trainer, parts.processor, evaluator=config.label)
        source = build_source(dataclasses.replace(parts.config.data, source=config.source), "eval")
        count = min(config.images or len(source), len(source))
        self._pictures = Pictures(self._towers, [source[index] for index in range(count)])
        self._names = sorted(set(self._pictures.captions))
        self._own = np.searchsorted(self._names, self._pictures.captions)

    def evaluate(self, state: TrainState) -> Evaluation:
        texts = [template.replace("{}", name) for name in self._names for template in self._templates]
        vectors = self._towers.embed_texts(state, texts).reshape(len(self._names), len(self._templates), -1).mean(axis=1)
        vectors /= np.linalg.norm(vectors, axis=-1, keepdims=True)
        found = np.argmax(self._pictures.embed(state) @ vectors.T, axis=1)
        accuracy = float(np.mean(found == self._own))
        line = f"{accuracy:.2%} of {len(self._own):,} images are of the class found, of {len(self._names)}"
        return Evaluation(metrics={"accuracy": accuracy}, line=line)
