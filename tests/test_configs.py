"""The recipes in configs/, as far as they need nothing that must be fetched."""

import dataclasses

import pytest

from configs import clip, llava15_stage1, llava15_stage2, siglip
from tests.tiny import mesh_of
from vlm_jax.config import RunConfig
from vlm_jax.config_dict import from_config_dict
from vlm_jax.models.dual_encoder import DualEncoder
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


@pytest.mark.parametrize("name", ["b32", "l14", "l14-336"])
def test_clip(name):
    """Radford et al. 2021, appendix F."""
    run = from_config_dict(RunConfig, clip.get_config(name))
    optimizer = run.optimizer
    assert (run.data.rows, run.data.tokens, run.objective.max_scale) == (32_768, 77, 100.0)
    assert (optimizer.b2, optimizer.eps, optimizer.weight_decay, optimizer.warmup_steps) == (0.98, 1e-6, 0.2, 2000)
    assert optimizer.lr == {"b32": 5e-4, "l14": 4e-4, "l14-336": 2e-5}[name]
    assert run.steps == (12_207 if name == "l14-336" else 390_625)
    check_pictures(run)


def test_clip_decays_no_gains_and_biases():
    run = from_config_dict(RunConfig, clip.get_config("b32"))
    tiny = dataclasses.replace(run.model.text.encoder, layers=1)  # whose paths are the same
    model = dataclasses.replace(run.model, text=dataclasses.replace(run.model.text, encoder=tiny))
    rules = Blueprint.of(DualEncoder(model), run.optimizer.rules, mesh_of(1, 1, 1)).rules
    undecayed = {path.split("/")[-1] for path, rule in rules.items() if not rule.decay}
    assert undecayed == {"scale", "bias", "logit_scale"}


@pytest.mark.parametrize("name,width", [("b16", 768), ("so400m", 1152)])
def test_siglip(name, width):
    run = from_config_dict(RunConfig, siglip.get_config(name))
    assert (run.model.loss, run.model.logit_bias, run.objective.max_scale) == ("sigmoid", -10.0, None)
    assert run.model.image.width == run.model.text.width == width and run.data.tokens == 64
