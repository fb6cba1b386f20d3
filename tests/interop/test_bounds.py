"""Every setting that is read from a published configuration has bounds, and published models are within them."""

import copy
import dataclasses
import json

import pytest
from test_published_sizes import PUBLISHED
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig

from vlm_jax.families.mosaic_gpt import MosaicGptConfig
from vlm_jax.interop.files import bounds
from vlm_jax.interop.files.settings import Rule, check_settings, read_settings
from vlm_jax.interop.files.source import PublishedError
from vlm_jax.interop.published import Family
from vlm_jax.interop.register import FAMILIES

# Only one value is implemented, and `require` refuses every other one.
ONE_VALUE = {"clip_qkv", "attn_clip_qkv", "softmax_scale", "logit_scale"}
DEFAULTS = [name for name in FAMILIES if isinstance(FAMILIES[name], Family) and name in CONFIG_MAPPING]


def read_while(monkeypatch, work):
    """The names of the numbers, texts and lists that are read of any configuration."""
    names, plain = set(), PreTrainedConfig.__getattribute__

    def get(config, name):
        value = plain(config, name)
        if not name.startswith("__") and not callable(value) and not isinstance(value, PreTrainedConfig | dict):
            names.add(plain(config, "attribute_map").get(name, name))
        return value

    with monkeypatch.context() as patched:
        patched.setattr(PreTrainedConfig, "__getattribute__", get)
        work()
    return names


def test_only_one_family_has_a_configuration_of_ours():
    names = {field.name for field in dataclasses.fields(MosaicGptConfig)}
    assert not names - bounds.CONFIG.keys() - ONE_VALUE
    others = {name for name in FAMILIES if isinstance(FAMILIES[name], Family)} - set(DEFAULTS)
    assert others == {"mosaic_gpt"}


@pytest.mark.parametrize("family", DEFAULTS)
def test_everything_that_is_read_has_bounds(monkeypatch, family):
    config = AutoConfig.for_model(family)
    if family == "idefics":
        config.use_resampler = True

    def read():
        ours = FAMILIES[family].config_from_hf(config)
        FAMILIES[family].table(ours, config)

    names = read_while(monkeypatch, read) - ONE_VALUE
    assert len(names) > 5 and not names - bounds.CONFIG.keys()


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_are_within(tmp_path, name):
    PUBLISHED[name][2].save_pretrained(tmp_path)
    check_settings(tmp_path, read_settings(tmp_path / "config.json"), bounds.CONFIG)


@pytest.mark.parametrize("family", DEFAULTS)
def test_the_defaults_of_transformers_are_within(tmp_path, family):
    AutoConfig.for_model(family).save_pretrained(tmp_path)
    check_settings(tmp_path, read_settings(tmp_path / "config.json"), bounds.CONFIG)


NEVER = (-1000.5, 1e300, "\n", [[]], [None])  # no setting can be any of these


@pytest.mark.parametrize("name", ["CONFIG", "ROPE", "GENERATION", "PROCESSING", "TOKENIZER", "OPEN_FLAMINGO", "GGUF"])
def test_no_bounds_let_everything_in(name):
    for setting, rule in getattr(bounds, name).items():
        if isinstance(rule, Rule):
            assert sum(not rule.good(value) for value in NEVER) >= 3, setting
            for value in NEVER:
                if not rule.good(value):
                    with pytest.raises(PublishedError, match=f"^x: {setting}="):
                        check_settings("x", {setting: value}, {setting: rule})
                    break


def test_a_truth_value_is_no_number():
    for setting, value in dict(hidden_size=True, rms_norm_eps=False, tie_word_embeddings=1, eos_token_id=[True]).items():
        with pytest.raises(PublishedError, match=f"config.json: {setting}={json.dumps(value)}".replace("[", r"\[")):
            check_settings("config.json", {setting: copy.copy(value)}, bounds.CONFIG)
