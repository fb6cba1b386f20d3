"""The recipes in configs/, as far as they need nothing that must be fetched."""

import pytest

from configs import llava15_stage1, llava15_stage2
from tests.tiny import mesh_of
from vlm_jax.config import RunConfig
from vlm_jax.config_dict import from_config_dict
from vlm_jax.models.vlm import VisionLanguageModel
from vlm_jax.training.params import Blueprint
from vlm_jax.training.step import check_pictures


def frozen_parts(run):
    """(part, whether all of it is frozen), and the rules by path."""
    rules = Blueprint.of(VisionLanguageModel(run.model), run.optimizer.rules, mesh_of(1, 1, 1)).rules
    return {part: all(rule.frozen for path, rule in rules.items() if path.startswith(part)) for part in run_parts(rules)}, rules


def run_parts(rules):
    return sorted({path.split("/")[0] for path in rules})


@pytest.mark.parametrize("size", llava15_stage1.SIZES)
def test_llava15(size):
    """Learning rates, what is trained, steps of an epoch, and what a row takes: the authors' scripts."""
    one, two = (from_config_dict(RunConfig, stage.get_config(size)) for stage in (llava15_stage1, llava15_stage2))
    for run in (one, two):
        check_pictures(run)
        assert (run.optimizer.weight_decay, run.optimizer.schedule, run.data.tokens) == (0.0, "cosine", 2048)
        assert run.optimizer.warmup_steps == round(0.03 * run.steps) and run.data.visual_tokens == 576
    assert (one.data.template, two.data.template) == ("plain", "vicuna_v1")
    assert (one.data.pad_to_square, two.data.pad_to_square) == (False, True)
    assert two.optimizer.lr == 2e-5 and two.steps == 5197 and two.init_from and not two.init_parts
    fates = {size: frozen_parts(run)[0] for size, run in (("one", one), ("two", two))}
    if size == "sharegpt4v-7b":
        assert one.optimizer.lr == 2e-5
        rules = frozen_parts(one)[1]
        assert {rule.rows_from for path, rule in rules.items() if path.startswith("vision/layers/")} == {12}
        assert all(rule.frozen for path, rule in rules.items() if path.startswith("vision/") and "/layers/" not in path)
    else:
        assert (one.optimizer.lr, one.steps) == (1e-3, 2180)
        assert fates["one"] == {"connector": False, "language": True, "vision": True}
        assert fates["two"] == {"connector": False, "language": False, "vision": True}


def test_stage_two_without_stage_one():
    run = from_config_dict(RunConfig, llava15_stage2.get_config("7b,without_stage1"))
    assert not run.init_from and [part.part for part in run.init_parts] == ["vision", "language"]
    with pytest.raises(ValueError, match="name a size behind a colon"):
        llava15_stage2.get_config("70b")
