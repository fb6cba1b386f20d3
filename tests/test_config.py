import dataclasses
import json

import pytest

from tests.tiny import tiny_run
from vlm_jax.config import (
    AlibiConfig,
    DualEncoderConfig,
    DynamicNtkScaling,
    EasyVqaConfig,
    ExpertsConfig,
    ImageTowerConfig,
    LearnedPositionsConfig,
    Llama3Scaling,
    LongRopeScaling,
    ModelConfig,
    OptimizerConfig,
    ParamRule,
    RopeConfig,
    RunConfig,
    TextTowerConfig,
    YarnScaling,
)
from vlm_jax.config_dict import from_config_dict, from_dict, to_config_dict, to_dict

RULES = (ParamRule(pattern="^vision", frozen=True, frozen_dtype="bfloat16"), ParamRule(pattern="norm", decay=0.0))


def runs():
    """Each kind of every choice at least once."""
    run = tiny_run(optimizer=OptimizerConfig(lr=1e-4, warmup_steps=3, rules=RULES))
    yield run
    llama3 = Llama3Scaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_positions=8192)
    longrope = LongRopeScaling(
        short_factors=(1.0, 2.0), long_factors=(1.5, 4.0), original_max_positions=8, attention_factor=1.1
    )
    scalings = (
        llama3,
        DynamicNtkScaling(factor=2.0, original_max_positions=8),
        YarnScaling(factor=2.0, original_max_positions=8, attention_factor=1.1),
        longrope,
    )
    block = dataclasses.replace(run.model.language.block, head_width=8, experts=ExpertsConfig(number=4, chosen=2))
    for window, positions in (
        *((7, RopeConfig(base=5e5, scaling=scaling, share=0.5)) for scaling in scalings),
        ((None, 3, 3), LearnedPositionsConfig(offset=2)),
        (None, AlibiConfig()),
    ):
        language = dataclasses.replace(run.model.language, positions=positions, window=window, block=block)
        yield dataclasses.replace(run, model=dataclasses.replace(run.model, language=language))
    vision = dataclasses.replace(run.model.vision, feature_layer=(-2, 0))
    endless = dataclasses.replace(run.model.language, max_positions=None)
    yield dataclasses.replace(run, model=dataclasses.replace(run.model, vision=vision, language=endless))
    alone = ModelConfig(vision=None, connector=None, fusion=None, language=run.model.language)
    yield dataclasses.replace(run, model=alone, data=dataclasses.replace(run.data, source=EasyVqaConfig()))


@pytest.mark.parametrize("run", runs())
def test_a_run_comes_back_from_json_and_from_a_config_dict(run):
    assert from_dict(RunConfig, json.loads(json.dumps(to_dict(run)))) == run
    back = from_config_dict(RunConfig, to_config_dict(run))
    assert back == run
    assert hash(back) == hash(run)  # tuples are still tuples


def test_two_towers_come_back_from_json():
    model = tiny_run().model
    image = ImageTowerConfig(encoder=model.vision, pool="attention", projection=8)
    text = TextTowerConfig(encoder=model.language, causal=False, pool="last", projection=8, projection_bias=True)
    config = DualEncoderConfig(image=image, text=text, loss="sigmoid", logit_scale=2.0, logit_bias=-10.0)
    assert from_dict(DualEncoderConfig, json.loads(json.dumps(to_dict(config)))) == config


def test_the_command_line_overrides_leaves_and_refuses_new_ones():
    config = to_config_dict(tiny_run())
    config.optimizer.lr = 0.5
    config.model.fusion.every = 3
    run = from_config_dict(RunConfig, config)
    assert (run.optimizer.lr, run.model.fusion.every) == (0.5, 3)
    with pytest.raises(AttributeError, match="learning_rate"):
        config.optimizer.learning_rate = 0.5


def test_a_whole_number_serves_where_a_fraction_is_expected():
    values = to_dict(tiny_run())
    values["optimizer"]["lr"] = 1
    assert isinstance(from_dict(RunConfig, values).optimizer.lr, float)


def changed(path, value):
    values = json.loads(json.dumps(to_dict(tiny_run())))
    *parents, last = path.split("/")
    inner = values
    for parent in parents:
        inner = inner[parent]
    inner[last] = value
    return values


@pytest.mark.parametrize(
    ("path", "value", "named"),
    [
        ("optimizer/learning_rate", 0.1, "learning_rate"),
        ("optimizer/schedule", "step", "optimizer.schedule"),
        ("optimizer/lr", "fast", "optimizer.lr"),
        ("optimizer/lr", True, "optimizer.lr"),
        ("optimizer/clip_norm", None, "optimizer.clip_norm"),
        ("optimizer/rules", [{"pattern": "x", "freeze": True}], "freeze"),
        ("steps", "many", "steps"),
        ("steps", 1.5, "steps"),
        ("model/language/block/heads", None, "model.language.block.heads"),
        ("model/language/positions/kind", "rotary", "positions"),
        ("model/vision/kind", "resnet", "model.vision"),
        ("data/source/kind", "csv", "data.source"),
        ("data/flip", True, "flip"),
    ],
)
def test_an_error_names_the_field(path, value, named):
    with pytest.raises(ValueError, match=named):
        from_dict(RunConfig, changed(path, value))


@pytest.mark.parametrize(
    "path",
    ["steps", "optimizer/lr", "data/source/train", "model/language/window", "model/language/positions/scaling"],
)
def test_a_missing_field_is_named(path):
    values = changed(path, None)
    *parents, last = path.split("/")
    inner = values
    for parent in parents:
        inner = inner[parent]
    del inner[last]
    with pytest.raises(ValueError, match=last if parents[-1:] != ["source"] else "data.source"):
        from_dict(RunConfig, values)
