"""The recipes in configs/, as far as they need nothing that must be fetched."""

import functools
import math

import pytest

from configs import flamingo, llava15_stage1, llava15_stage2, openflamingo
from tests.tiny import mesh_of
from vlm_jax.config import RunConfig
from vlm_jax.config_dict import from_config_dict
from vlm_jax.models.vlm import VisionLanguageModel
from vlm_jax.paths import by_path
from vlm_jax.training.params import Blueprint
from vlm_jax.training.sets import check_sets
from vlm_jax.training.step import check_pictures


@functools.cache
def blueprint(run):
    return Blueprint.of(VisionLanguageModel(run.model), run.optimizer.rules, mesh_of(1, 1, 1))


def frozen_parts(run):
    """(part, whether all of it is frozen), and the rules by path."""
    rules = blueprint(run).rules
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


@pytest.mark.parametrize("size", flamingo.SIZES)
def test_flamingo(size):
    """Weights, what is trained, what decays, and parameters: the paper's sections and tables."""
    config = flamingo.get_config(size)
    config.accumulated.vtp.data.source.train = "vtp.jsonl"  # as the command line does
    run = from_config_dict(RunConfig, config)
    check_sets(run)
    assert {one.name: one.weight for one in run.data_sets} == {"": 1.0, "align": 0.2, "ltip": 0.2, "vtp": 0.03}
    assert {one.name: one.data.rows * (one.data.images if one.name else 1) for one in run.data_sets} == {
        "": 256, "align": 512, "ltip": 512, "vtp": 64,
    }  # fmt: skip
    assert run.accumulated[2].data.source.train == "vtp.jsonl" and run.accumulated[2].data.frames == 8
    assert (run.data.next_image, run.data.images, run.data.tokens) == (0.5, 5, 256)
    assert {one.data.leading_space for one in run.accumulated} == {0.5} and run.data.leading_space == 0
    fates, rules = frozen_parts(run)
    assert fates == {"connector": False, "fusion": False, "language": False, "vision": True}
    decayed = {path.split("/")[0] for path, rule in rules.items() if not rule.frozen and rule.decay}
    assert decayed == {"fusion", "language"} and rules["language/embedding"].rows_from == 50_277
    assert {rule.frozen_dtype for rule in rules.values() if rule.frozen} == {"bfloat16"}
    optimizer = run.optimizer
    assert (optimizer.lr, optimizer.warmup_steps, optimizer.schedule, run.steps) == (1e-4, 5000, "constant", 500_000)
    # Keys and values come from CLIP's 1,024 here: the paper's 1.2B and 1.6B are with visual tokens as wide as the text.
    assert count(run, "fusion") == pytest.approx({"3b": 1.107e9, "9b": 1.40e9}[size], rel=0.01)


@pytest.mark.parametrize("size", openflamingo.SIZES)
def test_openflamingo(size):
    run = from_config_dict(RunConfig, openflamingo.get_config(size))
    check_sets(run)
    assert [(one.weight, one.data.learned) for one in run.data_sets] == [(1.0, "after_image"), (0.2, "all")]
    assert (run.optimizer.warmup_steps, run.steps, run.data.rows, run.data.images) == (1875, 29_296, 2048, 6)
    _, rules = frozen_parts(run)
    assert {path.split("/")[0] for path, rule in rules.items() if not rule.frozen and rule.decay} == {"fusion"}
    assert count(run, "connector") == 63_019_008
    assert count(run, "fusion") == {"3b": 881_000_496, "4b": 897_744_928, "9b": 1_115_815_952}[size]


def count(run, part):
    """Its parameters."""
    return sum(math.prod(leaf.shape) for path, leaf in by_path(blueprint(run).abstract).items() if path.startswith(part))
