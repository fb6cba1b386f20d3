"""Published folders with a damage: a clear line, or the same answers, or another configuration that is in its own right."""

import functools
import math
import re
import signal
from itertools import islice

import pytest
from folders import saved, tokenizer
from mutations import Damage, applied, drawn, judged, legitimate, opened
from test_encoder_folders import two_towers
from test_idefics import idefics_folder
from test_idefics2 import idefics2
from test_llava import FULL, llava, llava_next
from test_openflamingo import made as open_flamingo
from test_openflamingo import mosaic
from test_paligemma import paligemma
from test_vipllava import vipllava
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, CLIPImageProcessorPil, Dinov2Config

SAMPLE = 6  # damages of each family
SECONDS = 20  # for one of them, on a slow machine
SIZES = dict(hidden_size=32, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4)
HALF = [1.0, 1.1, 1.2, 1.4]  # one for each frequency of a head of 8
ORIGINAL = dict(original_max_position_embeddings=64)


def language_model(folder, family, **settings):
    words = tokenizer(chat_template="{% for message in messages %}{{ message['content'] }}{% endfor %}")
    config = AutoConfig.for_model(family, **SIZES | dict(vocab_size=len(words), max_position_embeddings=256) | settings)
    model = AutoModelForCausalLM.from_config(config)
    model.generation_config.update(max_new_tokens=7, num_beams=2, repetition_penalty=1.3, length_penalty=0.5)
    saved(folder, model, words)


def encoder(folder, family, **settings):
    saved(folder, AutoModel.from_config(AutoConfig.for_model(family, **SIZES | PICTURES | settings)), PROCESSOR)


LANGUAGE = {
    "gpt_neox": dict(),
    "qwen2": dict(num_key_value_heads=2, use_sliding_window=True, sliding_window=9, max_window_layers=1),
    "mixtral": dict(num_key_value_heads=2, num_local_experts=3, sliding_window=9),
    "opt": dict(ffn_dim=24),
    "mpt": dict(d_model=32, n_heads=4, n_layers=2, max_seq_len=256, expansion_ratio=4),
    "phi": dict(partial_rotary_factor=0.5),
    "stablelm": dict(use_qkv_bias=True, num_key_value_heads=4, partial_rotary_factor=0.5),
    "gemma": dict(num_key_value_heads=1, head_dim=8),
}
ROPES = {
    "default": dict(),
    "linear": dict(factor=4.0),
    "dynamic": dict(factor=3.0),
    "llama3": dict(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0) | ORIGINAL,
    "yarn": dict(factor=4.0, beta_fast=16.0, beta_slow=2.0, attention_factor=1.1) | ORIGINAL,
    "longrope": dict(short_factor=HALF, long_factor=HALF[::-1], factor=4.0) | ORIGINAL,
}
PICTURES = dict(image_size=16, patch_size=4)
PROCESSOR = CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
ENCODERS = {
    "clip_vision_model": dict(),
    "siglip_vision_model": dict(),
    "dinov2": dict(mlp_ratio=2),
    "dinov2_with_registers": dict(mlp_ratio=2, use_swiglu_ffn=True, num_register_tokens=2),
}


def llama_with(kind):
    rope = dict(rope_type=kind, rope_theta=5000.0) | ROPES[kind]
    return lambda folder: language_model(folder, "llama", num_key_value_heads=2, rope_parameters=rope)


FAMILIES = {
    "llava": llava,
    "llava_next": llava_next,
    "idefics": idefics_folder,
    "idefics2": idefics2,
    "paligemma": paligemma,
    "vipllava": vipllava,
    "llava_dinov2": functools.partial(llava, vision=Dinov2Config, tower=dict(image_size=28), **FULL),
    "open_flamingo": functools.partial(open_flamingo, build=mosaic, every=1),
    "clip": functools.partial(two_towers, family="clip"),
    "siglip": functools.partial(two_towers, family="siglip"),
}
FAMILIES |= {f"llama_{kind}": llama_with(kind) for kind in ROPES}
FAMILIES |= {name: functools.partial(language_model, family=name, **settings) for name, settings in LANGUAGE.items()}
FAMILIES |= {name: functools.partial(encoder, family=name, **settings) for name, settings in ENCODERS.items()}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Name of a family -> its folder, and what it is undamaged."""
    known = {}

    def make(family):
        if family not in known:
            folder = tmp_path_factory.mktemp("mutated") / family
            FAMILIES[family](folder)
            known[family] = folder, opened(folder)
        return known[family]

    return make


class Hang(BaseException):
    """No error that anything catches."""


@pytest.fixture(autouse=True)
def no_hang():
    """A damage that hangs fails here, and not after the time of the whole run."""

    def end(*_):
        raise Hang(f"more than {SECONDS} s")

    before = signal.signal(signal.SIGALRM, end)
    yield
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


def verdict_of(folder, undamaged, damage):
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    with applied(folder, damage):
        return judged(folder, undamaged)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_sample_of_damages(made, family):
    folder, undamaged = made(family)
    for damage in islice(drawn(folder, seed=1), SAMPLE):
        verdict = verdict_of(folder, undamaged, damage)
        assert verdict.kind in ("refused", "same") or (verdict.kind == "other" and legitimate(damage)), f"{damage}: {verdict}"
    assert opened(folder) == undamaged


@pytest.mark.parametrize(
    ("family", "where", "values", "match"),
    [
        ("llama_default", "config.json rope_parameters rope_theta", (0, -1), "rope_theta=.* above 1"),
        ("llama_default", "config.json rope_parameters rope_theta", (math.nan,), "has the number nan"),
        ("llama_linear", "config.json rope_parameters factor", (0, None), "factor"),
        ("llama_longrope", "config.json rope_parameters short_factor", ([1.0] * 3, []), "LongRoPE: expected 4|a list of 1 to"),
        ("llama_longrope", "config.json rope_parameters long_factor", ([1.0] * 5,), "LongRoPE: expected 4, one for each"),
        ("llava", "processor_config.json image_processor image_std", ([0.5, 0, 0.5],), "image_std=.* above 0"),
        ("llava", "processor_config.json image_processor image_mean", ([math.nan] * 3,), "has the number nan"),
        ("llava_next", "config.json image_grid_pinpoints", ([[16, 17]], [[16, 16]]), "expected the same, multiples of"),
        ("idefics2", "config.json perceiver_config resampler_n_heads", (0, True), "perceiver_config.resampler_n_heads="),
        ("mixtral", "config.json num_experts_per_tok", (4,), "4 experts are chosen for a token, and there are 3"),
        ("clip", "config.json projection_dim", (None, 10**12), "projection_dim="),
        ("siglip", "tokenizer_config.json pad_token", ("many",), "the tokenizer gives the token 14"),
        ("paligemma", "tokenizer_config.json bos_token", (None,), "no bos_token, with which this model's prompts begin"),
        ("qwen2", "tokenizer_config.json eos_token", ("many",), "the tokenizer gives the token"),
        ("llama_default", "tokenizer_config.json tokenizer_class", (None,), "tokenizer_class=null"),
        ("llama_default", "tokenizer.json model dropout", (0.5,), "model.dropout=0.5.*tokens are random"),
        ("llama_default", "tokenizer.json model continuing_subword_prefix", ("many",), "tokenizer cannot be read"),
        ("clip", "tokenizer.json post_processor special_tokens", ({},), "its tokenizer fails on"),
        ("llama_default", "chat_template.jinja", ("empty", "zeros"), "is empty|writes nothing of what is said"),
        ("llama_default", "model.safetensors", ("I32",), "found int32, expected floating-point numbers"),
        ("llama_default", "generation_config.json", ("folder", "link", "fifo"), "is not a regular file"),
    ],
)
def test_what_passed_or_failed_elsewhere(made, family, where, values, match):
    folder, undamaged = made(family)
    file, *keys = where.split()
    for value in values:
        verdict = verdict_of(folder, undamaged, Damage(file, tuple(keys), value))
        assert verdict.kind == "refused" and re.search(match, verdict.detail), f"{value}: {verdict}"


def test_a_hub_name_of_a_setting_is_in_the_error(made):
    """One line, with the file, the key, what was found and what was expected."""
    folder, undamaged = made("llama_llama3")
    verdict = verdict_of(folder, undamaged, Damage("config.json", ("rope_parameters", "high_freq_factor"), [4]))
    assert verdict.detail == (
        f"PublishedError: {folder}/config.json: rope_parameters.high_freq_factor=[4] (expected a number above 0 and at most "
        "1e+06): correct it, or fetch the file again"
    )
