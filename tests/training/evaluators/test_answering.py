"""Answers to held-out questions while a run trains: those that inference gives."""

import jax
import numpy as np
import pytest
from evaluator_helpers import CAPTIONS, known

from vlm_jax.config import GenerationConfig
from vlm_jax.errors import DataError
from vlm_jax.evaluation.metrics import METRICS
from vlm_jax.training.evaluators.generation import Generation


@METRICS.add("test_texts")
def texts(predictions, references):
    """Looks at what a metric is given."""
    texts.seen = (predictions, references)
    return {"count": len(predictions), "longest": max(map(len, predictions))}


def test_programs_are_compiled_once_and_the_state_is_left_as_it_is(folder):
    parts, state = known(folder, in_sequence=False, mesh=(1, 1, 1))
    generation = Generation(GenerationConfig(metric="test_texts", examples=5, max_new_tokens=8, rows=8), parts)
    assert generation.metrics == ("count", "longest")
    compiled = generation._answering.generator.programs.compiled
    with jax.set_mesh(parts.trainer.mesh):
        found = generation.evaluate(state)
        (answers, right), count = texts.seen, compiled()
        generation.evaluate(parts.trainer.state_of(jax.tree.map(np.zeros_like, state.params)))
    assert compiled() == count
    assert found.metrics["count"] == 5 and right == [[CAPTIONS[place]] for place in (0, 3, 6, 10, 1)]
    assert answers != texts.seen[0]  # of other parameters
    assert all(not leaf.is_deleted() for leaf in jax.tree.leaves(state.params))


def test_a_blind_model_gets_grey_pictures(folder):
    parts, _ = known(folder, in_sequence=False, mesh=(1, 1, 1))
    for blank in (False, True):
        answering = Generation(GenerationConfig(blank=blank), parts)._answering
        prompts = [answering._prompt(number, question) for number, question in enumerate(answering.questions)]
        pixels = np.asarray(answering.generator.place(prompts).images)[: len(prompts)]
        assert (np.unique(pixels).tolist() == [128]) == blank


def test_a_picture_that_is_gone_is_named(folder):
    parts, state = known(folder, in_sequence=True, mesh=(2, 2, 2))
    generation = Generation(GenerationConfig(examples=2, rows=8), parts)
    picture = folder / "True" / "data" / "0.png"
    kept = picture.read_bytes()
    picture.unlink()
    try:
        with jax.set_mesh(parts.trainer.mesh), pytest.raises(DataError, match=r"generation: .*jsonl:1.*0\.png"):
            generation.evaluate(state)
    finally:
        picture.write_bytes(kept)


def test_an_unknown_metric_lists_those_that_are_known(folder):
    parts, _ = known(folder, in_sequence=True, mesh=(2, 2, 2))
    with pytest.raises(ValueError, match=r"'bleu' is not known: expected one of .*'exact_match'"):
        Generation(GenerationConfig(metric="bleu"), parts)
