"""Seconds of a training step, beside transformers' IDEFICS or LLaVA in PyTorch on the same cores.

    python benchmarks/train_step.py --size tiny medium --repeats 7
    python benchmarks/train_step.py --size medium --rows 8 --tokens 256
    python benchmarks/train_step.py --size medium --profile

A step is forward, backward, clipping to norm 1 and AdamW on all parameters, in float32. First both take three steps from the
same weights on the same batch, and their losses must agree to 1e-4.

The limit is what the machine would need for it at best, measured beside it: the FLOPs of the step's matrix products at the rate
of a large product, and what AdamW moves (parameter, gradient and two moments read, three of them written) at the bandwidth of
memory.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import sys
from collections.abc import Callable
from typing import Any

import peers  # isort: skip  # it chooses the cores and how OpenMP waits before jax and torch start

import jax
import numpy as np
import optax
import torch
from peers import SIZES, Limit, Peers, alternate, build, inputs, ratio, seconds, table

from vlm_jax.batch import Batch
from vlm_jax.config import DataConfig, EasyVqaConfig, MeshConfig, ModelConfig, OptimizerConfig, RunConfig
from vlm_jax.sharding import make_mesh
from vlm_jax.training.flops import count_flops
from vlm_jax.training.step import Trainer

LR, DECAY, TOLERANCE = 1e-4, 0.1, 1e-4
ADAMW = 7 * 4  # bytes that are moved for a parameter


def run_config(model: ModelConfig, rows: int, tokens: int) -> RunConfig:
    data = DataConfig(
        source=EasyVqaConfig(), tokenizer="train", image_size=model.vision.image_size, rows=rows, tokens=tokens, images=1
    )
    optimizer = OptimizerConfig(lr=LR, warmup_steps=0, schedule="constant", weight_decay=DECAY, clip_norm=1.0)
    return RunConfig(model=model, data=data, optimizer=optimizer, steps=1000, dtype="float32")


def torch_step(model: torch.nn.Module, inputs: dict[str, torch.Tensor], compiled: bool) -> Callable[[], float]:
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=LR, weight_decay=DECAY, fused=True)
    forward = torch.compile(model) if compiled else model.train()

    def step() -> float:
        optimizer.zero_grad(set_to_none=True)
        loss = forward(**inputs, labels=inputs["input_ids"]).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        return loss.item()

    return step


def our_step(trainer: Trainer, params: Any, batch: Batch) -> Callable[[], float]:
    state, batch = trainer.state_of(params), trainer.put(batch)

    def step() -> float:
        nonlocal state
        state, metrics = trainer.train_step(state, batch)
        return float(jax.block_until_ready((state, metrics))[1]["loss"])

    return step


def compare(size: str, repeats: int, *, compiled: bool, rows: int, tokens: int) -> tuple[str, ...]:
    """One row of the table.

    Raises:
      SystemExit: the losses do not agree.
    """
    both = build(size)
    batch, theirs = inputs(both, rows, tokens)
    trainer = Trainer(run_config(both.config, rows, tokens), make_mesh(MeshConfig(), jax.devices()[:1]))
    with jax.set_mesh(trainer.mesh):
        ours = our_step(trainer, both.params, batch)
        peer = torch_step(both.torch_model, theirs, compiled)
        losses = np.array([(peer(), ours()) for _ in range(3)])
        if not np.abs(losses[:, 0] - losses[:, 1]).max() < TOLERANCE:
            sys.exit(f"{size}: the losses of three steps differ, PyTorch {losses[:, 0]}, vlm_jax {losses[:, 1]}")
        times = alternate(peer, ours, repeats)
        flops = count_flops(functools.partial(trainer.gradients, recompute=False), both.params, {}, batch)
    least = Limit.measured().seconds(flops=flops, moved=ADAMW * both.parameters)
    medians = [f"{1000 * statistics.median(side):.1f}" for side in times]
    medians += [f"{1000 * least:.1f}", *(f"{100 * least / statistics.median(side):.0f}%" for side in times)]
    agreed = f"{np.abs(losses[:, 0] - losses[:, 1]).max():.0e}"
    return (size, f"{both.parameters / 1e6:.1f}M", f"{rows}x{tokens}", *medians, ratio(*times), agreed)


def profile(both: Peers, rows: int, tokens: int, repeats: int) -> str:
    """Where our step's time goes; each part is a program of its own, so the sum is not exactly the step."""
    trainer = Trainer(run_config(both.config, rows, tokens), make_mesh(MeshConfig(), jax.devices()[:1]))
    model = trainer.model
    with jax.set_mesh(trainer.mesh):
        state = trainer.state_of(both.params)
        params, batch = state.trained, trainer.put(inputs(both, rows, tokens)[0])
        part = lambda method: jax.jit(lambda params, *args: model.apply({"params": params}, *args, method=method))

        images = batch.images.reshape(-1, *batch.images.shape[3:])
        see = part(lambda module, images: module.vision(images))
        features = see(params, images)
        features = features.reshape(*batch.images.shape[:3], *features.shape[1:])
        connect = part(lambda module, features, frames: module.connector(features, frames)[0])
        visual = connect(params, features, batch.frames)
        read = part(lambda module, visual, batch: module.logits(module.read(batch, visual=visual).hidden))
        loss = lambda params, batch: trainer.objective.sums(model, params, batch)["loss"]
        forward, backward = jax.jit(loss), jax.jit(jax.grad(loss))
        gradients = backward(params, batch)

        @jax.jit
        def update(gradients: Any, opt_state: Any, params: Any) -> Any:
            updates, opt_state = trainer.optimizer.update(gradients, opt_state, params)
            return optax.apply_updates(params, updates), opt_state

        runs = {
            "vision forward": lambda: see(params, images),
            "connector forward": lambda: connect(params, features, batch.frames),
            "language and fusion forward": lambda: read(params, visual, batch),
            "whole forward and loss": lambda: forward(params, batch),
            "forward and backward": lambda: backward(params, batch),
            "clipping and AdamW": lambda: update(gradients, state.opt_state, params),
        }
        times = {}
        for name, run in runs.items():
            jax.block_until_ready(run())
            times[name] = statistics.median(seconds(lambda run=run: jax.block_until_ready(run())) for _ in range(repeats))
        step = our_step(trainer, both.params, inputs(both, rows, tokens)[0])
        step()
        times["the step itself"] = whole = statistics.median(seconds(step) for _ in range(repeats))
    times["backward (by difference)"] = times["forward and backward"] - times["whole forward and loss"]
    order = (*list(runs)[:4], "backward (by difference)", *list(runs)[4:], "the step itself")
    lines = [(name, f"{1000 * times[name]:.1f}", f"{100 * times[name] / whole:.0f}%") for name in order]
    return table(("part of our step", "ms", "of the step"), lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--rows", type=int, help="of a batch (default: the size's own)")
    parser.add_argument("--tokens", type=int, help="of a row")
    parser.add_argument("--repeats", type=int, default=7, help="pairs of steps that are timed (default 7)")
    parser.add_argument("--compile", action="store_true", help="torch.compile the peer (default: eager, as most run it)")
    parser.add_argument("--profile", action="store_true", help="where our step's time goes, instead of the comparison")
    args = parser.parse_args()
    print(peers.conditions())
    if args.profile:
        for size in args.size:
            print(f"{size}:\n{profile(build(size), SIZES[size].rows, SIZES[size].tokens, args.repeats)}\n", flush=True)
        return
    header = ("size", "parameters", "batch", "PyTorch ms", "vlm_jax ms", "limit ms", "PyTorch of it", "vlm_jax of it")
    header += ("PyTorch / vlm_jax", "losses differ by")
    shape = lambda size: dict(rows=args.rows or SIZES[size].rows, tokens=args.tokens or SIZES[size].tokens)
    rows = [compare(size, args.repeats, compiled=args.compile, **shape(size)) for size in args.size]
    print(table(header, rows))


if __name__ == "__main__":
    main()
