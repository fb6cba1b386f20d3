"""Answers to held-out questions while a run trains: those that inference gives."""

import dataclasses
import json

import jax
import pytest
from evaluator_helpers import CAPTIONS, known, run_of

import vlm_jax
from vlm_jax.config import GenerationConfig, RankingConfig
from vlm_jax.config.run import RunConfig
from vlm_jax.config_dict import from_dict, to_dict
from vlm_jax.errors import DataError
from vlm_jax.evaluation.metrics import METRICS
from vlm_jax.training.evaluators.generation import Generation
from vlm_jax.training.loop import train


def test_a_run_reports_what_inference_answers(folder):
    evaluators = (GenerationConfig(every=6, rows=8, max_new_tokens=8), RankingConfig(rows=8, name="captions"))
    config = run_of(folder / "trained", evaluators=evaluators, best_by="generation_exact_match", save_every=6, keep_last=1)
    result = train(from_dict(RunConfig, json.loads(json.dumps(to_dict(config)))), folder / "trained" / "run")
    lines = [json.loads(line) for line in (folder / "trained" / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "eval_generation_exact_match" in line] == [6, 12]
    assert {"eval_captions_r5", "eval_captions_prior_r10"} <= {name for line in lines for name in line}
    vlm = vlm_jax.load(folder / "trained" / "run")
    files = [str(folder / "trained" / "data" / f"{number}.png") for number in range(len(CAPTIONS) + 2)]
    answers = [vlm.generate("", images=[file], max_new_tokens=8) for file in files]
    expected = METRICS["exact_match"](answers, [[caption] for caption in CAPTIONS + CAPTIONS[:2]])
    assert result.metrics["generation_exact_match"] == pytest.approx(expected["exact_match"])


@METRICS.add("test_texts")
def texts(predictions, references):
    """Looks at what a metric is given."""
    texts.seen = (predictions, references)
    return {"count": len(predictions), "longest": max(map(len, predictions))}


def test_programs_are_compiled_once_and_the_state_is_left_as_it_is(folder):
    parts, state = known(folder, in_sequence=False, mesh=(1, 1, 1))
    generation = Generation(GenerationConfig(metric="test_texts", examples=5, max_new_tokens=8, rows=8), parts)
    assert generation.metrics == ("count", "longest")
    opened = dataclasses.replace(state, trained=jax.tree.map(lambda x: 0.5 * x, state.trained))
    with jax.set_mesh(parts.trainer.mesh):
        found = generation.evaluate(state)
        first = texts.seen
        compiled = generation._answering.generator.programs.compiled()
        generation.evaluate(opened)
    assert generation._answering.generator.programs.compiled() == compiled
    assert found.metrics["count"] == 5 and first[1] == [
        [CAPTIONS[0]],
        [CAPTIONS[3]],
        [CAPTIONS[6]],
        [CAPTIONS[10]],
        [CAPTIONS[1]],
    ]
    assert first[0] != texts.seen[0]  # other parameters, other answers
    assert all(not leaf.is_deleted() for leaf in jax.tree.leaves(state.params))


def test_grey_pictures_all_get_one_answer(folder):
    parts, state = known(folder, in_sequence=False, mesh=(1, 1, 1))
    with jax.set_mesh(parts.trainer.mesh):
        Generation(GenerationConfig(metric="test_texts", max_new_tokens=8, rows=8), parts).evaluate(state)
        seen = set(texts.seen[0])
        Generation(GenerationConfig(metric="test_texts", max_new_tokens=8, rows=8, blank=True), parts).evaluate(state)
    assert len(seen) > 1 and len(set(texts.seen[0])) == 1


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
    with pytest.raises(ValueError, match="'bleu' is not known: expected one of .*'exact_match'"):
        Generation(GenerationConfig(metric="bleu"), parts)
