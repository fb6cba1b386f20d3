"""Runs that evaluators look at: around Flamingo's fusion and LLaVA's, with captions of several lengths."""

import dataclasses
import functools
import json
from pathlib import Path

import jax
from PIL import Image

from tests.tiny import COLOURS, mesh_of, random_params, tiny_run
from vlm_jax.config import InSequenceConfig, JsonLinesConfig, MlpProjectorConfig
from vlm_jax.data.pipeline import build_source
from vlm_jax.training.evaluator import RunParts
from vlm_jax.training.processors import build_processor
from vlm_jax.training.step import Trainer

CAPTIONS = [f"{size}{name}" for size in ("a ", "the very large ", "") for name in COLOURS]


def write_captions(folder: Path, prompt: str = "") -> Path:
    """Fourteen pictures of squares with a caption each; the first two captions are there twice."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for number, caption in enumerate(CAPTIONS + CAPTIONS[:2]):
        shade = tuple((value + 9 * number) % 256 for value in COLOURS[caption.split()[-1]])
        Image.new("RGB", (16, 16), shade).save(folder / f"{number}.png")
        turns = [{"from": "human", "value": f"<image>\n{prompt}"}, {"from": "gpt", "value": caption}]
        lines.append(json.dumps({"id": str(number), "image": f"{number}.png", "conversations": turns}))
    path = folder / "captions.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return path


def run_of(folder: Path, *, in_sequence: bool = False, **changes):
    """A run's configuration; its data are in `folder`."""
    file = str(write_captions(folder / "data"))
    config = tiny_run(**changes)
    data = dataclasses.replace(config.data, source=JsonLinesConfig(train=file, eval=file), cache_dir=str(folder / "cache"))
    if in_sequence:
        model = dataclasses.replace(config.model, connector=MlpProjectorConfig(width=32), fusion=InSequenceConfig())
        config, data = dataclasses.replace(config, model=model), dataclasses.replace(data, visual_tokens=4)
    return dataclasses.replace(config, data=data)


def parts_of(config, folder: Path, mesh) -> RunParts:
    source, held_out = (build_source(config.data, split) for split in ("train", "eval"))
    processor = build_processor(config.data, source, folder)
    with jax.set_mesh(mesh):
        trainer = Trainer(config, mesh)
    return RunParts(config=config, trainer=trainer, processor=processor, source=source, held_out=held_out)


def state_of(trainer: Trainer):
    """All parameters random, gates open."""
    with jax.set_mesh(trainer.mesh):
        return trainer.state_of(random_params(trainer.model, *trainer.model.example()))


@functools.cache
def known(folder: Path, *, in_sequence: bool, mesh: tuple[int, int, int]):
    """(parts, state) of a run that several tests ask."""
    folder = folder / str(in_sequence)
    parts = parts_of(run_of(folder, in_sequence=in_sequence), folder, mesh_of(*mesh))
    return parts, state_of(parts.trainer)
