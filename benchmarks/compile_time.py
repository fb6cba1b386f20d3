"""How long the training step of a deep model compiles, against that of a shallow one; and the same of its generation.

    python benchmarks/compile_time.py --layers 4 32 --repeats 3
    python benchmarks/compile_time.py --generation --size medium --layers 4 32

Lowering and compiling without the persistent cache. Layers are scanned, or compiled a few at a time, so the ratio should stay
near 1 (generation: near 2, since 4 layers are half a piece). Generation is what the first answer takes longer than the second:
the prompt and the first token, and 32 more.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import sys

import peers  # isort: skip  # it chooses the cores and how OpenMP waits before jax and torch start

import jax
import numpy as np
from decode import greedy
from peers import IDEFICS, seconds, table
from train_step import run_config
from transformers import IdeficsConfig

from vlm_jax.batch import Batch
from vlm_jax.config import MeshConfig, ModelConfig
from vlm_jax.families import idefics
from vlm_jax.generation.programs import STEPS, Programs
from vlm_jax.interop.engine import abstract_params
from vlm_jax.models.vlm import VisionLanguageModel
from vlm_jax.sharding import make_mesh
from vlm_jax.training.step import Trainer, zeros_batch


def with_layers(model: ModelConfig, layers: int) -> ModelConfig:
    """As many in the vision tower as in the language model."""
    return dataclasses.replace(
        model,
        language=dataclasses.replace(model.language, layers=layers),
        vision=dataclasses.replace(model.vision, layers=layers),
    )


def compile_seconds(model: ModelConfig, rows: int, tokens: int) -> tuple[float, float]:
    """Seconds to lower and to compile."""
    jax.clear_caches()
    config = run_config(model, rows, tokens)
    trainer = Trainer(config, make_mesh(MeshConfig(), jax.devices()[:1]))
    with jax.set_mesh(trainer.mesh):
        batch = jax.eval_shape(lambda: zeros_batch(config, rows))
        steps = []
        lower = seconds(lambda: steps.append(trainer.train_step.lower(trainer.abstract_state, batch)))
        return lower, seconds(steps[0].compile)


def generation_seconds(model: ModelConfig, rows: int, tokens: int) -> tuple[float, float]:
    """Seconds that the first answer takes longer than the second: (prefill and first token, further tokens)."""
    jax.clear_caches()
    whole = VisionLanguageModel(dataclasses.replace(model, vision=None, connector=None, fusion=None))
    params = jax.tree.map(lambda x: jax.numpy.zeros(x.shape, x.dtype), abstract_params(whole))
    programs = Programs(whole, params, mesh=make_mesh(MeshConfig(), jax.devices()[:1]))
    positions = np.repeat(np.arange(tokens, dtype=np.int32)[None], rows, axis=0)
    zeros, ones = np.zeros_like(positions), np.ones_like(positions)
    prompts = Batch(tokens=ones, positions=positions, segments=ones, media_last=zeros, media_first=zeros, prefix_end=positions)
    row_settings, constraints = greedy(rows, STEPS + 1, vocabulary=model.language.vocab_size)
    times, states = [], []
    for _ in range(2):
        begin = lambda: states.append(programs.begin(prompts, row_settings, constraints, slots=256)[0])
        first = seconds(lambda begin=begin: (begin(), jax.block_until_ready(states[-1])))
        times.append((first, seconds(lambda: programs.more(states.pop(), constraints, most=STEPS))))
    return tuple(once - again for once, again in zip(*times, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=IDEFICS, default="tiny", help="widths of the model; the depth is --layers")
    parser.add_argument("--layers", nargs=2, type=int, default=[4, 32], metavar=("SHALLOW", "DEEP"))
    parser.add_argument("--generation", action="store_true", help="of generation by the language model, not of training")
    parser.add_argument("--repeats", type=int, default=3, help="compilations of each (default 3)")
    args = parser.parse_args()
    if args.repeats < 1 or min(args.layers) < 1:
        sys.exit("--layers and --repeats must be 1 or more")
    jax.config.update("jax_enable_compilation_cache", False)
    print(peers.conditions() + f"widths of {args.size}\n")
    size = IDEFICS[args.size]
    model = idefics.config_from_hf(IdeficsConfig(**size.config))
    shallow, deep = args.layers
    measure = generation_seconds if args.generation else compile_seconds
    measure(with_layers(model, 1), size.rows, size.tokens)  # what only the first compilation does
    found: dict[int, list[tuple[float, float]]] = {shallow: [], deep: []}
    for _ in range(args.repeats):
        for layers in found:
            found[layers].append(measure(with_layers(model, layers), size.rows, size.tokens))
    base = [sum(pair) for pair in found[shallow]]
    lines = []
    for layers, pairs in found.items():
        totals = [sum(pair) for pair in pairs]
        ratios = [total / first for total, first in zip(totals, base, strict=True)]
        medians = [f"{statistics.median(side):.2f}" for side in (*zip(*pairs, strict=True), totals)]
        lines.append((str(layers), *medians, f"{statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})"))
    parts = ("prefill s", "further tokens s") if args.generation else ("lower s", "compile s")
    print(table(("layers", *parts, "both s", "ratio"), lines))


if __name__ == "__main__":
    main()
