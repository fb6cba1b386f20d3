"""A training step on packed rows beside one on padded rows: how much of a row is padding, and examples a second.

    python benchmarks/packing.py --config=configs/smollm2_stage2.py:without_stage1 --repeats 5

Padded: a sequence a row, as long as the longest of all, as trainers that do not pack do it when rows are not grouped by length.
Packed: the recipe's rows, each sequence with its own visual tokens. Shared: also the visual tokens of an image stand once for
all its questions (`data.share_prefix`). All three have about the same number of places in a step; steps take turns.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import statistics
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.table import Table

from vlm_jax import runtime
from vlm_jax.config import DataConfig, MeshConfig, RunConfig
from vlm_jax.config_dict import from_config_dict
from vlm_jax.data.pipeline import TrainBatches, build_source, tokens_of
from vlm_jax.sharding import make_mesh
from vlm_jax.training.processors import build_processor
from vlm_jax.training.step import Trainer


def recipe(name: str) -> RunConfig:
    file, _, option = name.partition(":")
    spec = importlib.util.spec_from_file_location("recipe", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return from_config_dict(RunConfig, module.get_config(option) if option else module.get_config())


def layouts(data: DataConfig, longest: int) -> dict[str, DataConfig]:
    """The data of each way of filling rows."""
    rows = data.rows * data.tokens // longest
    padded = dict(rows=rows, tokens=longest, images=1, sequences_per_image=1, share_prefix=False)
    return {
        "padded": dataclasses.replace(data, **padded),
        "packed": dataclasses.replace(data, share_prefix=False),
        "shared": dataclasses.replace(data, share_prefix=True),
    }


class Way:
    """One way of filling rows, and its step."""

    def __init__(self, config: RunConfig, data: DataConfig, workdir: Path, params: Any) -> None:
        config = dataclasses.replace(config, data=dataclasses.replace(data, cache_features=False, workers=0))
        mesh = make_mesh(MeshConfig(), jax.devices()[:1])
        source = build_source(config.data, "train")
        processor = build_processor(config.data, source, workdir)
        self.trainer = Trainer(config, mesh)
        with TrainBatches(config, processor, source) as batches:
            self.batches = [next(batches) for _ in range(3)]
        self.state, self.seconds = self.trainer.state_of(params), []

    def step(self) -> float:
        batch = self.trainer.put(self.batches[len(self.seconds) % len(self.batches)])
        began = time.perf_counter()
        self.state, metrics = jax.block_until_ready(self.trainer.train_step(self.state, batch))
        self.seconds.append(time.perf_counter() - began)
        return float(metrics["loss"])

    @property
    def padding(self) -> float:
        return float(np.mean([np.mean(batch.segments == 0) for batch in self.batches]))

    @property
    def examples(self) -> float:
        """Sequences with something to learn in a step, on average."""
        count = lambda batch: sum(len(set(row[of > 0].tolist())) for row, of in zip(batch.segments, batch.weights, strict=True))
        return float(np.mean([count(batch) for batch in self.batches]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/smollm2_stage2.py:without_stage1")
    parser.add_argument("--repeats", type=int, default=5, help="steps that are timed (default 5)")
    parser.add_argument("--workdir", type=Path, default=Path("/tmp/packing"), help="where the tokenizer is kept")
    args = parser.parse_args()
    runtime.prepare()
    config = recipe(args.config)
    source = build_source(config.data, "train")
    processor = build_processor(config.data, source, args.workdir)
    longest = int(tokens_of(dataclasses.replace(config.data, share_prefix=False), processor, source).lengths.max())
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    with jax.set_mesh(mesh):
        params = Trainer(config, mesh).init().params
        ways = {name: Way(config, data, args.workdir, params) for name, data in layouts(config.data, longest).items()}
        del params
        for _ in range(args.repeats + 1):
            for way in ways.values():
                way.step()
    table = Table(title=f"{args.config}, rows of {config.data.tokens} places, the longest sequence takes {longest}")
    for name in ("rows", "places a step", "padding", "examples a step", "s a step", "examples/s", "ratio"):
        table.add_column(name, justify="right")
    rates = {name: way.examples / statistics.median(way.seconds[1:]) for name, way in ways.items()}
    for name, way in ways.items():
        places = way.batches[0].tokens.size
        seconds = statistics.median(way.seconds[1:])
        cells = (f"{way.padding:.1%}", f"{way.examples:.1f}", f"{seconds:.2f}", f"{rates[name]:.1f}")
        table.add_row(name, str(places), *cells, f"{rates[name] / rates['padded']:.2f}")
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
