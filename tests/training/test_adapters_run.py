"""A LoRA run from a published LLaVA: trained, loaded, its adapter and the merged model written for PEFT and transformers."""

import dataclasses
import logging

import jax
import numpy as np
import pytest
import torch
from folders import logits, picture
from peft import PeftModel
from published_families import FAMILIES, chat, loaded, run_config, write_conversations
from torch_helpers import compare

import infer
import vlm_jax
from tests.tiny import mesh_of
from vlm_jax.config import LoraConfig, ParamRule
from vlm_jax.generation.request import chat_request
from vlm_jax.interop.files.source import PublishedError
from vlm_jax.layers.lora import merged, without_adapters
from vlm_jax.paths import by_path
from vlm_jax.training.checkpoint import Checkpoints, load_run
from vlm_jax.training.initial import first_state
from vlm_jax.training.loop import train
from vlm_jax.training.step import Trainer

ADAPTER = LoraConfig(pattern="^language/layers/", rank=2, alpha=4.0, dropout=0.1)
RULES = (ParamRule(pattern="/lora/"), ParamRule(pattern="^connector", lr=0.1), ParamRule(pattern="", frozen=True))


@pytest.fixture(scope="module")
def tuned(tmp_path_factory, runs_on_one_device):
    """(folder with `published` and `run`, the question, the run's configuration)."""
    folder = tmp_path_factory.mktemp("lora")
    FAMILIES["llava"].made(folder / "published", 1)
    data = folder / "data"
    data.mkdir()
    picture(0, 30, 18).save(data / "0_0.png")
    question = [dict(role="user", content=[dict(type="image", image=str(data / "0_0.png")), dict(type="text", text="what?")])]
    said = [*question, dict(role="assistant", content=[dict(type="text", text="two dogs run in the park.")])]
    lines = write_conversations(data, [said])
    whole = dict.fromkeys(("steps", "eval_every", "save_every", "log_every"), 2)
    run = run_config(folder / "published", lines, dict(rows=8, tokens=128, images=2), adapters=(ADAPTER,), **whole)
    run = dataclasses.replace(run, optimizer=dataclasses.replace(run.optimizer, lr=0.02, warmup_steps=0, rules=RULES))
    train(run, folder / "run")
    return folder, question, run


def test_loaded_switched_and_written(tuned):
    folder, question, _ = tuned
    vlm = vlm_jax.load(folder / "run", dtype="float32")
    request = chat_request(question)
    ours = logits(vlm, request)
    assert vlm.adapters == ("default",) and np.abs(logits(vlm.with_adapters(), request) - ours).max() > 1e-2
    vlm_jax.export(folder / "run", folder / "adapter", adapter="default")
    with pytest.raises(PublishedError, match="there is no adapter 'other'"):
        vlm_jax.export(folder / "run", folder / "none", adapter="other")
    vlm_jax.export(folder / "run", folder / "merged")
    family = FAMILIES["llava"]
    from transformers import AutoProcessor

    inputs = chat(AutoProcessor.from_pretrained(folder / "published", backend="pil"), question)
    model = PeftModel.from_pretrained(loaded(folder / "published"), folder / "adapter").eval()
    with torch.no_grad():
        compare(ours, family.logits(model, inputs, ()))
        compare(ours, family.logits(loaded(folder / "merged"), inputs, ()))


def test_infer_takes_an_adapter_along(tuned, tmp_path, capsys):
    folder, *_ = tuned
    vlm_jax.export(folder / "run", tmp_path / "adapter", adapter="default")
    image = folder / "data" / "0_0.png"
    asked = [f"--checkpoint={folder / 'published'}", f"--image={image}", "--prompt=what?", "--max-new-tokens=6"]
    said = []
    for more in ([], [f"--adapter={tmp_path / 'adapter'}"]):
        infer.main([*asked, *more])
        said.append(capsys.readouterr().out.strip())
    assert said[1] == vlm_jax.load(folder / "run").generate("what?", images=[image], max_new_tokens=6) != said[0]


def test_another_run_takes_adapters_along_or_merges_them(tuned, tmp_path, caplog):
    folder, _, run = tuned
    mesh = mesh_of(1, 1, 1)
    before = load_run(folder / "run", mesh).params
    frozen = (ParamRule(pattern="^language", frozen=True, frozen_dtype="int8"),)
    cases = {
        "default": (RULES[:2] + frozen, (ADAPTER,)),
        "other": (RULES[:2] + frozen, (dataclasses.replace(ADAPTER, name="other"),)),
    }
    for name, (rules, adapters) in cases.items():
        changed = dataclasses.replace(run, init_from=str(folder / "run"), adapters=adapters)
        changed = dataclasses.replace(changed, optimizer=dataclasses.replace(run.optimizer, rules=rules))
        with jax.set_mesh(mesh), caplog.at_level(logging.WARNING):
            caplog.clear()
            trainer = Trainer(changed, mesh)
            checkpoints = Checkpoints(tmp_path / name, keep_last=1, keep_best=0)
            state, _ = first_state(trainer, checkpoints, tmp_path / name)
            checkpoints.close()
        found, wanted = by_path(state.params), by_path(before)
        b = f"language/layers/mlp/up/lora/{name}/b"
        if name == "default":
            np.testing.assert_array_equal(found[b], wanted[b])
            wanted = by_path(without_adapters(before))
        else:
            assert not np.asarray(found[b]).any() and "its adapters default are merged" in caplog.text
            wanted = by_path(merged(before))
        up = "language/layers/mlp/up/kernel"
        error = np.abs(found[up].astype(np.float32) * found[f"{up}_scale"] - wanted[up])
        assert error.max() <= 0.51 * np.asarray(found[f"{up}_scale"]).max()
