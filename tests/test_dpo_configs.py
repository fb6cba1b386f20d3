"""The recipes of direct preference optimisation."""

import dataclasses

import pytest

from configs import dpo_easyvqa, dpo_rlhfv
from tests.tiny import mesh_of, tiny_run
from vlm_jax.config import EasyVqaConfig, RunConfig, SampleRule
from vlm_jax.config_dict import from_config_dict
from vlm_jax.models.vlm import VisionLanguageModel
from vlm_jax.training.params import Blueprint
from vlm_jax.training.run_folder import write_or_check_config
from vlm_jax.training.sets import check_data


def test_llava15_on_rlhfv():
    """The authors' script for this model; everything but the vision encoder is trained."""
    run = from_config_dict(RunConfig, dpo_rlhfv.get_config())
    check_data(run)
    assert (run.objective.beta, run.objective.length_normalised, run.objective.reference) == (0.1, False, "frozen")
    assert (run.optimizer.lr, run.optimizer.weight_decay, run.optimizer.schedule) == (5e-7, 0.01, "cosine")
    assert (run.steps, run.optimizer.warmup_steps, run.data.rows, run.data.pad_to_square) == (2672, 134, 8, True)
    rules = Blueprint.of(VisionLanguageModel(run.model), run.optimizer.rules, mesh_of(1, 1, 1)).rules
    assert {path.split("/")[0] for path, rule in rules.items() if rule.frozen} == {"vision"}
    assert not any(rule.frozen for path, rule in rules.items() if not path.startswith("vision"))


def test_easy_vqa_goes_on_from_a_run(tmp_path):
    """Model, frozen parts and processing are the run's; a tokenizer that it trained is named, not trained again."""
    base = tiny_run()
    data = dataclasses.replace(base.data, source=EasyVqaConfig(), sampling=(SampleRule(pattern="x", share=0.5),))
    before = dataclasses.replace(base, data=data)
    write_or_check_config(tmp_path / "run", before)
    for choice, kind in ((str(tmp_path / "run"), "jsonl"), (f"{tmp_path / 'run'},made_up", "easy_vqa_pairs")):
        run = from_config_dict(RunConfig, dpo_easyvqa.get_config(choice))
        check_data(run)
        assert (run.data.source.kind, run.data.pairs, run.data.sampling) == (kind, True, ())
        assert run.data.tokenizer == str(tmp_path / "run" / "tokenizer") and run.init_from == str(tmp_path / "run")
        assert run.model == before.model and run.optimizer.rules == before.optimizer.rules
        assert run.optimizer.lr == before.optimizer.lr / 50
    with pytest.raises(ValueError, match="name a run behind a colon"):
        dpo_easyvqa.get_config()
