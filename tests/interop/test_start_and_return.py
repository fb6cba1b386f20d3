"""Training starts from a published checkpoint, and what was trained goes back to transformers."""

import dataclasses

import jax
import numpy as np
import pytest
import torch
from folders import load, logits, picture, saved, tokenizer, verbatim
from test_encoder_folders import two_towers
from test_idefics import idefics_folder, listed
from test_llava import llava
from test_paligemma import paligemma
from torch_helpers import compare, rounding
from transformers import IdeficsForVisionText2Text, LlamaConfig, LlamaForCausalLM

import vlm_jax
from configs import finetune
from tests.tiny import mesh_of, thorough, tiny_run, write_data
from vlm_jax.config import JsonLinesConfig, ParamRule, PartInit, RunConfig
from vlm_jax.config_dict import from_config_dict
from vlm_jax.data.pipeline import TrainBatches, build_source
from vlm_jax.errors import RequestError
from vlm_jax.files import CHECKSUMS, ChecksumError
from vlm_jax.interop.files.source import PublishedError
from vlm_jax.interop.published import open_published
from vlm_jax.paths import by_path
from vlm_jax.training.checkpoint import Checkpoints, load_run
from vlm_jax.training.initial import first_state
from vlm_jax.training.loop import train
from vlm_jax.training.processors import build_processor
from vlm_jax.training.run_folder import CheckpointError
from vlm_jax.training.sets import check_data
from vlm_jax.training.step import Trainer

pytestmark = pytest.mark.usefixtures("runs_on_one_device")


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
    compare(logits(vlm, verbatim(vlm, *prompt)), theirs)


def test_another_model_is_refused(tmp_path):
    folder = tmp_path / "published"
    idefics_folder(folder, extra=("<EOC>",))
    config = run_of(tmp_path, folder)
    fusion = dataclasses.replace(config.model.fusion, mlp_width=64)
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, fusion=fusion))
    with pytest.raises(CheckpointError, match=r"in 3 parameters; fusion/layers/mlp/down/kernel is \(2, 56, 32\) and should be"):
        train(config, tmp_path / "run")


def test_what_has_no_published_name_is_not_exported(run, tmp_path):
    with pytest.raises(RequestError, match="was not started from a published checkpoint"):
        vlm_jax.export(run, tmp_path / "back")
    assert not (tmp_path / "back").exists()


def test_an_exported_folder_is_read_as_it_was_written(tmp_path):
    """A flipped bit in any of its files is named; what was not exported has no checksums."""
    idefics_folder(tmp_path / "a")
    vlm_jax.export(tmp_path / "a", tmp_path / "b")
    jax.tree.map(np.testing.assert_array_equal, vlm_jax.load(tmp_path / "b").params, vlm_jax.load(tmp_path / "a").params)
    files = [file for file in (tmp_path / "b").iterdir() if file.name != CHECKSUMS]
    assert {"model.safetensors", "config.json", "tokenizer.json"} < {file.name for file in files}
    for file in files:
        intact = file.read_bytes()
        middle = len(intact) // 2
        file.write_bytes(intact[:middle] + bytes([intact[middle] ^ 1]) + intact[middle + 1 :])
        # What is JSON no more is named before any checksum is read.
        with pytest.raises((ChecksumError, PublishedError), match=f"{file.name}(: is not the file that was| is damaged)"):
            vlm_jax.load(tmp_path / "b")
        file.write_bytes(intact)


def test_the_type_that_is_held_is_the_type_that_is_written(tmp_path):
    idefics_folder(tmp_path / "a")
    published = open_published(tmp_path / "a")
    vlm = vlm_jax.load(tmp_path / "a", dtype="bfloat16")
    published.export(published.load_params(vlm.generator.mesh, dtype="bfloat16"), tmp_path / "b")
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


def test_parts_start_from_several_checkpoints(tmp_path, caplog):
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
    assert "stage 1 is skipped" not in caplog.text
    every_part = dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, rules=()))
    with pytest.raises(CheckpointError, match="this checkpoint has no part of that name"):
        train(dataclasses.replace(every_part, init_parts=(*config.init_parts, wrong)), tmp_path / "fourth")
    assert "stage 1 is skipped: the connector starts untrained" in caplog.text


def test_a_deeper_language_model_begins_with_the_layers_that_there_are(run, tmp_path, caplog):
    """Flamingo's "grafting": those behind them are new."""
    base = tiny_run()
    deeper = dataclasses.replace(base.model, language=dataclasses.replace(base.model.language, layers=5))
    config = dataclasses.replace(base, model=deeper, init_parts=(PartInit(part="language", checkpoint=str(run), new_layers=2),))
    mesh = mesh_of(1, 1, 1)
    with jax.set_mesh(mesh):
        trainer = Trainer(config, mesh)
        checkpoints = Checkpoints(tmp_path, 1, 0)
        params = first_state(trainer, checkpoints, tmp_path)[0].params
        checkpoints.close()
        before = load_run(run, mesh).params
    assert "its 3 layers come first, and 2 behind them start untrained" in caplog.text
    for path, leaf in by_path(params["language"]).items():
        old = by_path(before["language"])[path]
        np.testing.assert_array_equal(leaf[: len(old)], old, err_msg=path)
    new = params["language"]["layers"]["mlp"]["up"]["kernel"]
    assert new.shape[0] == 5 and new[3].std() == pytest.approx(32**-0.5, rel=0.1) and (new[3] != new[4]).any()


def with_vision(folder, family):
    return {"llava": llava, "paligemma": paligemma}[family](folder, tie_word_embeddings=family == "paligemma")


@pytest.mark.parametrize(("family", "words"), [thorough("llava", "its own"), ("paligemma", "recipe")])
def test_visual_tokens_in_packed_rows(tmp_path, family, words):
    """A row holds several conversations with pictures; each is what their model reads alone. Then two steps, and back."""
    folder = tmp_path / "published"
    model, _ = with_vision(folder, family)
    published = open_published(folder)
    base = run_of(tmp_path, folder)
    own = dict(end="</s>") if words == "recipe" else dict(processor=str(folder))
    data = dataclasses.replace(base.data, **own, visual_tokens=16, image_size=16, tokens=96)
    config = dataclasses.replace(base, model=published.config, data=data)
    source = build_source(data, "train")
    with TrainBatches(config, build_processor(data, source, tmp_path / "processor"), source) as batches:
        batch = next(iter(batches))
    assert batch.segments.max() > 1 and (batch.visual > 16).any()
    vlm = load(folder)
    ours = np.asarray(jax.jit(vlm.model.apply)({"params": vlm.params}, batch))
    seen = 0
    for row, segment in [(0, 1), (0, 2), (1, 1), (1, 2)]:
        place = np.flatnonzero(batch.segments[row] == segment)
        ids = torch.tensor(batch.tokens[row, place], dtype=torch.long)[None]
        slots = sorted(set(((batch.visual[row, place] - 1) // 16)[batch.visual[row, place] > 0].tolist()))
        seen += len(slots)
        vision = published.config.vision
        pixels = (batch.images[row, slots, 0] / 255.0 - np.array(vision.mean)) / np.array(vision.std)
        more = dict(pixel_values=torch.tensor(pixels.transpose(0, 3, 1, 2), dtype=torch.float32)) if slots else {}
        if family == "paligemma":
            prefix = batch.positions[row, place] <= batch.prefix_end[row, place[0]]
            assert prefix.any() and not prefix[batch.weights[row, place] > 0][1:].any(), "the last of the prompt is learned at"
            more["token_type_ids"] = torch.tensor(~prefix, dtype=torch.long)[None]
        with torch.no_grad():
            theirs = model(input_ids=ids, attention_mask=torch.ones_like(ids), **more).logits[0]
        compare(ours[row, place], theirs, rounding(theirs))
    assert seen > 1
    train(config, tmp_path / "run")
    run = vlm_jax.load(tmp_path / "run")
    assert run.answer([run.request("what color?", [picture(1, 20, 30)])], max_new_tokens=4)[0].tokens
    vlm_jax.export(tmp_path / "run", tmp_path / "back")
    trained, info = type(model).from_pretrained(tmp_path / "back", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    before, after = model.state_dict(), trained.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and not any("vision_tower" in name for name in changed)


def test_the_recipe_for_any_checkpoint(tmp_path):
    llava(tmp_path / "llava")
    idefics_folder(tmp_path / "idefics")
    for name, tokens in (("llava", 16), ("idefics", 0)):
        run = from_config_dict(RunConfig, finetune.get_config(str(tmp_path / name)))
        assert (run.data.visual_tokens, run.data.processor) == (tokens, str(tmp_path / name))
        assert run.model == open_published(tmp_path / name).config
        check_data(run)
    two_towers(tmp_path / "clip", "clip")
    with pytest.raises(ValueError, match="is an encoder: it answers nothing"):
        finetune.get_config(str(tmp_path / "clip"))


def test_the_data_must_lay_pictures_out_as_the_model_reads_them(tmp_path):
    llava(tmp_path / "published")
    config = run_of(tmp_path, tmp_path / "published")
    for changes, message in (
        (dict(), "config.data.visual_tokens=0: the model has 16 visual tokens of a tile in the sequence: set it to 16"),
        (dict(visual_tokens=16, image_size=32), "set config.data.image_size=16 and frames=1"),
    ):
        with pytest.raises(ValueError, match=message):
            train(dataclasses.replace(config, data=dataclasses.replace(config.data, end="</s>", **changes)), tmp_path / "run")
    crossing = tiny_run(data=dataclasses.replace(tiny_run().data, visual_tokens=4))
    with pytest.raises(ValueError, match="visual_tokens=4: the model reads pictures by cross-attention, or none: set it to 0"):
        check_data(crossing)
