"""The recipes in configs/, as far as they need nothing that must be fetched."""

import dataclasses
import functools
import math

import pytest

from configs import clip, flamingo, llava15_stage1, llava15_stage2, llava_next, openflamingo, siglip
from tests.tiny import mesh_of
from vlm_jax.config import RunConfig
from vlm_jax.config_dict import from_config_dict
from vlm_jax.models.dual_encoder import DualEncoder
from vlm_jax.models.vlm import VisionLanguageModel
from vlm_jax.paths import by_path
from vlm_jax.training.params import Blueprint
from vlm_jax.training.sets import check_data, check_sets


@functools.cache
def blueprint(run):
    return Blueprint.of(VisionLanguageModel(run.model), run.optimizer.rules, mesh_of(1, 1, 1), run.adapters)


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
        check_data(run)
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


@pytest.mark.parametrize("choice", ["7b,lora", "13b,qlora,without_stage1"])
def test_llava15_with_adapters(choice):
    """`finetune_lora.sh`: every linear map of the language model but the head; what is trained, and how the rest is held."""
    run = from_config_dict(RunConfig, llava15_stage2.get_config(choice))
    assert bool(run.init_parts) == ("without_stage1" in choice)
    leaves, rules = by_path(blueprint(run).abstract), blueprint(run).rules
    maps = [path for path in rules if path.startswith("language/") and path.endswith("/kernel")]
    adapted = {path.split("/lora/")[0] for path in rules if "/lora/" in path}
    assert adapted == {path.removesuffix("/kernel") for path in maps} - {"language/lm_head"} and len(adapted) == 7
    rates = {path: rule.lr * run.optimizer.lr for path, rule in rules.items() if not rule.frozen}
    assert {path for path in rates if "/lora/" not in path} == {path for path in rules if path.startswith("connector/")}
    assert {round(rate, 9) for path, rate in rates.items() if "/lora/" in path} == {2e-4}
    assert {round(rate, 9) for path, rate in rates.items() if "/lora/" not in path} == {2e-5}
    held = "int8" if "qlora" in choice else "bfloat16"
    assert {str(leaves[f"{path}/kernel"].dtype) for path in adapted} == {held}
    assert leaves["language/lm_head/kernel"].dtype == leaves["language/embedding"].dtype == "bfloat16"
    query = leaves["language/layers/attention/query/lora/default/a"]
    assert (
        query.shape[-1] == 128 and query.dtype == "float32" and run.adapters[0].alpha == 256 and run.adapters[0].dropout == 0.05
    )
    for wrong in ("7b,lora,qlora", "sharegpt4v-7b,lora", "7b,loro"):
        with pytest.raises(ValueError, match=r"lora or qlora|behind a comma without_stage1, lora, qlora"):
            llava15_stage2.get_config(wrong)


@pytest.mark.parametrize("size", llava_next.SIZES)
def test_llava_next(size):
    run = from_config_dict(RunConfig, llava_next.get_config(size))
    check_data(run)
    fates, rules = frozen_parts(run)
    assert not any(fates.values()) and set(fates) == {"connector", "fusion", "language", "vision"}
    rates = {path.split("/")[0]: round(rule.lr * run.optimizer.lr, 9) for path, rule in rules.items()}
    assert rates == {"connector": 1e-5, "fusion": 1e-5, "language": 1e-5, "vision": 2e-6}
    assert (run.data.tokens, run.optimizer.weight_decay, run.optimizer.warmup_steps) == (32_768, 0.0, round(0.03 * run.steps))


@pytest.mark.parametrize("name", ["b32", "l14", "l14-336"])
def test_clip(name):
    """Radford et al. 2021, appendix F."""
    run = from_config_dict(RunConfig, clip.get_config(name))
    optimizer = run.optimizer
    assert (run.data.rows, run.data.tokens, run.objective.max_scale) == (32_768, 77, 100.0)
    assert (optimizer.b2, optimizer.eps, optimizer.weight_decay, optimizer.warmup_steps) == (0.98, 1e-6, 0.2, 2000)
    assert optimizer.lr == {"b32": 5e-4, "l14": 4e-4, "l14-336": 2e-5}[name]
    assert run.steps == (12_207 if name == "l14-336" else 390_625)
    check_data(run)


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
    published = size.endswith("-published")
    assert decayed == {"fusion", "language"} and rules["language/embedding"].rows_from == (32_000 if published else 50_277)
    assert {rule.frozen_dtype for rule in rules.values() if rule.frozen} == {"bfloat16"}
    optimizer = run.optimizer
    assert (optimizer.lr, optimizer.warmup_steps, optimizer.schedule, run.steps) == (1e-4, 5000, "constant", 500_000)
    # Keys and values come from CLIP's 1,024 or the resampler's 1,536 here: the paper's 1.2B, 1.6B and 10B are with visual
    # tokens as wide as the text.
    sizes = {"3b": 1.107e9, "9b": 1.40e9, "3b-published": 1.158e9, "9b-published": 1.443e9, "80b-published": 8.355e9}
    assert count(run, "fusion") == pytest.approx(sizes[size], rel=0.01)
    if published:
        assert count(run, "vision") == pytest.approx(430.6e6, rel=0.001)
        # 13/12 of the paper's attention are its relative positions.
        assert count(run, "language") == pytest.approx({"3b": 1.27e9, "9b": 6.57e9, "80b": 64.7e9}[size[:-10]], rel=0.01)


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
