"""Training starts from a published checkpoint, and what was trained goes back to transformers."""

import dataclasses

import jax
import numpy as np
import pytest
import torch
from folders import load, logits, picture, saved, tokenizer
from test_encoders import two_towers
from test_idefics import idefics_folder, listed
from torch_helpers import compare
from transformers import IdeficsForVisionText2Text, LlamaConfig, LlamaForCausalLM

import vlm_jax
from tests.tiny import tiny_run, write_data
from vlm_jax.config import JsonLinesConfig, ParamRule, PartInit, RunConfig
from vlm_jax.generation.request import RequestError
from vlm_jax.interop.published import open_published
from vlm_jax.paths import by_path
from vlm_jax.training.checkpoint import CheckpointError
from vlm_jax.training.loop import train


def run_of(tmp_path, folder) -> RunConfig:
    base = tiny_run()
    data = str(write_data(tmp_path / "data", examples=8))
    return dataclasses.replace(
        base,
        model=open_published(folder).config,
        data=dataclasses.replace(base.data, source=JsonLinesConfig(train=data, eval=data), tokenizer=str(folder)),
        optimizer=dataclasses.replace(base.optimizer, rules=(ParamRule(pattern="^vision", frozen=True),)),
        init_from=str(folder),
        steps=2,
        save_every=2,
        eval_every=2,
    )


def test_trained_from_published_and_exported(tmp_path):
    folder = tmp_path / "published"
    model, processor = idefics_folder(folder, extra=("<EOC>",))
    config = run_of(tmp_path, folder)
    train(config, tmp_path / "run")
    assert vlm_jax.export(tmp_path / "run", tmp_path / "back") > 0
    trained, info = IdeficsForVisionText2Text.from_pretrained(tmp_path / "back", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    before, after = model.state_dict(), trained.state_dict()
    same = {name for name in before if torch.equal(before[name], after[name])}
    assert same == {name for name in before if name.startswith("model.vision_model.")}, "what is frozen, and nothing else"
    assert max(float((before[name] - after[name]).abs().max()) for name in before) < 0.1, "two small steps away"
    prompt = ("<image>what color?", [picture(1, 20, 30)])
    vlm = load(tmp_path / "back")
    with torch.no_grad():
        theirs = trained.eval()(**processor(text=[listed(*prompt)])).logits[0]
    compare(logits(vlm, vlm.processor.request(*prompt)), theirs)


def test_another_model_is_refused(tmp_path):
    folder = tmp_path / "published"
    idefics_folder(folder, extra=("<EOC>",))
    config = run_of(tmp_path, folder)
    fusion = dataclasses.replace(config.model.fusion, mlp_width=64)
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, fusion=fusion))
    with pytest.raises(CheckpointError, match=r"in 3 parameters; fusion/layers/mlp/down/kernel is \(2, 56, 32\) and should be"):
        train(config, tmp_path / "run")


def test_what_has_no_published_name_is_not_exported(tmp_path):
    data = str(write_data(tmp_path / "data", examples=8))
    base = tiny_run(steps=1, save_every=1, eval_every=1)
    source = JsonLinesConfig(train=data, eval=data)
    train(dataclasses.replace(base, data=dataclasses.replace(base.data, source=source)), tmp_path / "run")
    with pytest.raises(RequestError, match="was not started from a published checkpoint"):
        vlm_jax.export(tmp_path / "run", tmp_path / "back")
    assert not (tmp_path / "back").exists()


def test_the_type_that_is_held_is_the_type_that_is_written(tmp_path):
    idefics_folder(tmp_path / "a")
    published = open_published(tmp_path / "a")
    vlm = vlm_jax.load(tmp_path / "a", dtype="bfloat16")
    published.export(published.load_params(vlm.generator.mesh, "bfloat16"), tmp_path / "b")
    model = IdeficsForVisionText2Text.from_pretrained(tmp_path / "b")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    with pytest.raises(ValueError, match="is not empty: export into a new folder"):
        published.export(vlm.params, tmp_path / "b")


def test_nan_is_named_before_anything_is_loaded(tmp_path):
    model, _ = idefics_folder(tmp_path)
    name = "model.layers.1.mlp.up_proj.weight"
    model.state_dict()[name][3, 4] = float("nan")
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"^{name} holds 1 values that are not finite: the file is damaged$"):
        load(tmp_path)


def test_every_mesh_gets_the_same_numbers(tmp_path):
    idefics_folder(tmp_path)
    one, spread = load(tmp_path).params, load(tmp_path, "data=1,fsdp=4,tensor=2").params
    jax.tree.map(np.testing.assert_array_equal, one, spread)
    kernel = spread["language"]["layers"]["attention"]["query"]["kernel"]
    assert kernel.addressable_shards[0].data.size * 8 == kernel.size, "each device holds its own part"


def saved_llama(folder):
    words = tokenizer()
    sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2)
    saved(folder, LlamaForCausalLM(LlamaConfig(vocab_size=len(words), **sizes)), words)


def test_parts_start_from_several_checkpoints(tmp_path):
    """The vision encoder of a CLIP, the language model of its own checkpoint with two tokens more, the rest fresh."""
    two_towers(tmp_path / "clip", "clip")
    saved_llama(tmp_path / "llama")
    base = tiny_run(steps=2, save_every=2, eval_every=2)
    data = str(write_data(tmp_path / "data", examples=8))
    vision = dataclasses.replace(open_published(tmp_path / "clip").config.image.encoder, class_token="dropped")
    decoder = open_published(tmp_path / "llama").config.language
    known = decoder.vocab_size
    model = dataclasses.replace(base.model, vision=vision, language=dataclasses.replace(decoder, vocab_size=known + 2))
    config = dataclasses.replace(
        base,
        model=model,
        data=dataclasses.replace(
            base.data, source=JsonLinesConfig(train=data, eval=data), tokenizer=str(tmp_path / "llama"), image_size=16
        ),
        optimizer=dataclasses.replace(base.optimizer, rules=(ParamRule(pattern="^(vision|language)", frozen=True),)),
        init_parts=(
            PartInit(part="vision", checkpoint=str(tmp_path / "clip")),
            PartInit(part="language", checkpoint=str(tmp_path / "llama")),
        ),
    )
    train(config, tmp_path / "run")
    params = vlm_jax.load(tmp_path / "run").params
    jax.tree.map(np.testing.assert_array_equal, params["vision"], load(tmp_path / "clip").params["image"]["encoder"])
    expected = load(tmp_path / "llama").params["language"]
    for path, leaf in by_path(params["language"]).items():
        one = by_path(expected)[path]
        if path in ("embedding", "lm_head/kernel"):
            axis = one.shape.index(known)
            new, leaf = np.take(leaf, [known, known + 1], axis), np.take(leaf, range(known), axis)
            np.testing.assert_allclose(new, np.repeat(one.mean(axis, keepdims=True), 2, axis), atol=1e-6)
        np.testing.assert_array_equal(leaf, one, err_msg=path)
    for wrong, message in (
        (PartInit(part="fusion", checkpoint=str(tmp_path / "clip")), "fusion=.*clip: this checkpoint has no part of that name"),
        (PartInit(part="vision", checkpoint=str(tmp_path / "llama")), "this checkpoint has no part of that name"),
    ):
        with pytest.raises(CheckpointError, match=message):
            train(dataclasses.replace(config, init_parts=(wrong,)), tmp_path / "other")
    narrow = dataclasses.replace(model.vision, layers=3)
    with pytest.raises(CheckpointError, match=r"init_parts vision=.*other parts or sizes than config.model in \d+ parameters"):
        train(dataclasses.replace(config, model=dataclasses.replace(model, vision=narrow)), tmp_path / "third")
