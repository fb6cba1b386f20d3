"""Bytes that a compiled training step needs beside its arguments, of models that need not fit here: nothing is allocated.

    python benchmarks/memory.py --case vocabulary long

`vocabulary` is Gemma-2B with PaliGemma's 257,216 tokens at 8 rows of 2,048: whole logits would be 17 GB. `long` is a LLaMA of
1.1B parameters at one row of 8,192 tokens: whole attention weights would be 8.6 GB a layer. In float32 on one device, every
layer rematerialised. XLA's `memory_analysis` counts for this machine's CPU; a GPU's or TPU's program differs in its details.
"""

from __future__ import annotations

import argparse
import dataclasses

import peers  # isort: skip  # it chooses the cores before jax starts

import jax
from peers import seconds, table

from vlm_jax.config import DataConfig, EasyVqaConfig, LanguageConfig, MeshConfig, ModelConfig, OptimizerConfig, RunConfig
from vlm_jax.models.sizes import language
from vlm_jax.sharding import make_mesh
from vlm_jax.training.step import Trainer, zeros_batch

PALIGEMMA_VOCABULARY = 257_216


def small_llama() -> LanguageConfig:
    """TinyLlama's sizes."""
    large = language("llama-3-8b")
    block = dataclasses.replace(large.block, width=2048, heads=32, kv_heads=4, head_width=64, mlp_width=5632)
    return dataclasses.replace(large, vocab_size=32_000, layers=22, block=block)


CASES = {
    "vocabulary": lambda: (dataclasses.replace(language("gemma-2b"), vocab_size=PALIGEMMA_VOCABULARY), 8, 2048),
    "long": lambda: (small_llama(), 1, 8192),
}


def step_memory(name: str) -> tuple[str, ...]:
    """One row of the table."""
    model, rows, tokens = CASES[name]()
    data = DataConfig(source=EasyVqaConfig(), tokenizer="train", image_size=16, rows=rows, tokens=tokens, images=0)
    config = RunConfig(
        model=ModelConfig(vision=None, connector=None, fusion=None, language=model),
        data=data,
        optimizer=OptimizerConfig(lr=1e-4, warmup_steps=0),
        steps=1,
        dtype="float32",
        remat="full",
    )
    trainer = Trainer(config, make_mesh(MeshConfig(), jax.devices()[:1]))
    with jax.set_mesh(trainer.mesh):
        batch = jax.eval_shape(lambda: zeros_batch(config, rows))
        lowered = trainer.train_step.lower(trainer.abstract_state, batch)
        compiled = []
        took = seconds(lambda: compiled.append(lowered.compile()))
    memory = compiled[0].memory_analysis()
    billions = sum(x.size for x in jax.tree.leaves(trainer.abstract_state.params)) / 1e9
    sizes = (memory.argument_size_in_bytes, memory.temp_size_in_bytes)
    return (name, f"{billions:.2f}B", f"{rows} x {tokens}", *(f"{size / 1e9:.2f}" for size in sizes), f"{took:.1f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", nargs="+", choices=CASES, default=list(CASES))
    args = parser.parse_args()
    print(peers.conditions())
    lines = [step_memory(name) for name in args.case]
    print(table(("case", "parameters", "tokens", "arguments GB", "temporary GB", "compile s"), lines))


if __name__ == "__main__":
    main()
