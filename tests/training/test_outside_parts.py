"""Another package's connector, objective, source and published family, found by an entry point: trained, gone on with, back."""

import json
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from folders import picture
from safetensors.numpy import load_file, save_file
from test_llava import llava

import vlm_jax
from vlm_jax.config import DataConfig, OptimizerConfig, RunConfig
from vlm_jax.config.register import RegisterError, load_plugins
from vlm_jax.config_dict import from_dict, to_dict
from vlm_jax.interop.published import open_published
from vlm_jax.training.loop import train

OUTSIDE = Path(__file__).parents[1] / "outside"
STEPS = 4


@pytest.fixture
def outside(monkeypatch):
    monkeypatch.syspath_prepend(str(OUTSIDE))
    load_plugins.cache_clear()


def published(folder: Path) -> dict[str, np.ndarray]:
    """A folder of the family, made of a LLaVA's: its projector gives way to the other connector."""
    llava(folder)
    config = json.loads((folder / "config.json").read_text()) | {"model_type": "outside_llava"}
    (folder / "config.json").write_text(json.dumps(config))
    state = load_file(folder / "model.safetensors")
    state = {name: tensor for name, tensor in state.items() if "multi_modal_projector" not in name}
    widths = config["text_config"]["hidden_size"], config["vision_config"]["hidden_size"]
    state["pairs.weight"] = np.random.default_rng(0).normal(size=widths).astype(np.float32)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    return state


def run_of(folder: Path, checkpoint: Path) -> RunConfig:
    """From JSON, as `config.json` of a run holds it: every kind is known by its name alone."""
    (folder / "data").mkdir()
    rows = []
    for number in range(6):
        picture(number, 20, 30).save(folder / "data" / f"{number}.png")
        rows.append(f"{number}.png,what is {number}?,{'even' if number % 2 == 0 else 'odd'}")
    (folder / "data" / "table.csv").write_text("\n".join(rows) + "\n")
    path = str(folder / "data" / "table.csv")
    model = open_published(checkpoint).config
    values = dict(
        model=to_dict(model),
        data=dict(
            source=dict(kind="outside_table", train=path, eval=path),
            processor=str(checkpoint),
            image_size=16,
            rows=8,
            tokens=64,
            images=2,
            visual_tokens=8,
            cache_dir=str(folder / "cache"),
        ),
        objective=dict(kind="outside_smoothed", share=0.1),
        optimizer=to_dict(OptimizerConfig(lr=1e-3, warmup_steps=1)),
        steps=STEPS,
        save_every=2,
        eval_every=2,
        init_from=str(checkpoint),
    )
    return from_dict(RunConfig, json.loads(json.dumps(values)))


def test_a_run_from_its_start_to_an_answer(outside, tmp_path, capfd, runs_on_one_device):
    state = published(tmp_path / "published")
    config = run_of(tmp_path, tmp_path / "published")
    assert isinstance(config.data, DataConfig) and type(config.data.source).__name__ == "TableConfig"
    train(config, tmp_path / "run")
    assert "smoothed loss" in capfd.readouterr().out
    lines = (tmp_path / "run" / "metrics.jsonl").read_text()
    # As after a kill: the newest checkpoint is gone, and the same run goes on from the one before.
    shutil.rmtree(tmp_path / "run" / "checkpoints" / str(STEPS))
    train(config, tmp_path / "run")
    assert "resuming at step 2" in capfd.readouterr().out
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == lines

    vlm_jax.export(tmp_path / "run", tmp_path / "back")
    back = load_file(tmp_path / "back" / "model.safetensors")
    assert len(back) == len(state)  # the hub spells LLaVA's towers otherwise than transformers does in memory
    assert np.any(back["pairs.weight"] != state["pairs.weight"])
    asked = dict(prompt="what is 3?", images=[tmp_path / "data" / "3.png"], max_new_tokens=4)
    answers = [vlm_jax.load(tmp_path / name, dtype="float32").generate(**asked) for name in ("run", "back")]
    assert answers[0] == answers[1]


def test_a_plugin_that_cannot_be_imported_is_named(tmp_path, monkeypatch):
    shutil.copytree(OUTSIDE / "outside_parts-1.0.dist-info", tmp_path / "broken-1.0.dist-info")
    entry = tmp_path / "broken-1.0.dist-info" / "entry_points.txt"
    entry.write_text("[vlm_jax.plugins]\nbroken = no_such_module\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    load_plugins.cache_clear()
    with pytest.raises(RegisterError, match=r"the plugin broken \(no_such_module\) cannot be imported: ModuleNotFoundError"):
        load_plugins()
    load_plugins.cache_clear()


def test_no_file_of_the_library_speaks_of_it():
    found = subprocess.run(["grep", "-rl", "outside_", "vlm_jax"], cwd=OUTSIDE.parents[1], capture_output=True, text=True)
    assert found.stdout == ""
