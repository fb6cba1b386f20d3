"""Tokens a second of greedy generation, beside transformers' IDEFICS in PyTorch on the same cores.

    python benchmarks/decode.py --size tiny medium --rows 1 8 --repeats 5

A prompt of 32 tokens after one image, 64 new tokens, both with a cache, float32, the same weights. The tokens of both sides
must be equal.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import sys
from collections.abc import Callable

import peers  # isort: skip  # it chooses the cores and how OpenMP waits before jax and torch start

import jax
import numpy as np
import torch
from peers import SIZES, Peers, alternate, build, inputs, ratio, table

from vlm_jax.data.batch import Batch
from vlm_jax.generation import decode
from vlm_jax.generation.buckets import STOP_WIDTH, STOPS
from vlm_jax.generation.decode import NEVER, Prompts, Rules
from vlm_jax.generation.sampling import Sampling
from vlm_jax.generation.unstack import unstack, worth_unstacking
from vlm_jax.models.vlm import VisionLanguageModel


def torch_side(both: Peers, theirs: dict[str, torch.Tensor], new: int) -> Callable[[], np.ndarray]:
    model = both.torch_model.eval()
    model.generation_config.eos_token_id = None
    prompt = theirs["input_ids"].shape[1]

    def run() -> np.ndarray:
        with torch.inference_mode():
            tokens = model.generate(**theirs, use_cache=True, do_sample=False, max_new_tokens=new, pad_token_id=0)
        return tokens[:, prompt:].numpy()

    return run


def our_side(both: Peers, batch: Batch, new: int) -> Callable[[], np.ndarray]:
    rows, vocabulary = batch.tokens.shape[0], both.config.language.vocab_size
    params = jax.device_put(both.params)
    params = unstack(params) if worth_unstacking(params) else params
    prompts = Prompts(
        images=batch.images,
        frames=batch.frames,
        tokens=batch.tokens,
        positions=batch.positions,
        segments=batch.segments,
        media_first=batch.media_first,
        media_last=batch.media_last,
    )
    greedy = Sampling(
        temperature=np.zeros(rows, np.float32),
        top_k=np.zeros(rows, np.int32),
        top_p=np.ones(rows, np.float32),
        repetition_penalty=np.ones(rows, np.float32),
        seeds=np.zeros(rows, np.uint32),
    )
    rules = Rules(
        allowed=np.ones(vocabulary, bool),
        ends=np.full(1, NEVER, np.int32),
        stops=np.full((STOPS, STOP_WIDTH), NEVER, np.int32),
        limits=np.full(rows, new, np.int32),
        pad=np.int32(0),
    )
    program = jax.jit(functools.partial(decode.generate, VisionLanguageModel(both.config)), static_argnums=0)
    return lambda: np.asarray(program(new, params, prompts, greedy, rules).tokens)


def compare(both: Peers, size: str, rows: int, prompt: int, new: int, repeats: int) -> tuple[str, ...]:
    """One row of the table.

    Raises:
      SystemExit: the tokens are not equal.
    """
    batch, theirs = inputs(both, rows, prompt)
    peer, ours = torch_side(both, theirs, new), our_side(both, batch, new)
    expected, found = peer(), ours()
    if not np.array_equal(expected, found):
        row, place = np.argwhere(expected != found)[0]
        sys.exit(f"{size}, {rows} rows: tokens differ first in row {row} at new token {place}:\n{expected[row]}\n{found[row]}")
    times = alternate(peer, ours, repeats)
    rates = [f"{rows * new / statistics.median(side):.0f}" for side in times]
    return (size, f"{both.parameters / 1e6:.1f}M", str(rows), *rates, ratio(*times))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 8], help="batch sizes (default 1 8)")
    parser.add_argument("--prompt", type=int, default=32, help="tokens of the prompt (default 32)")
    parser.add_argument("--new", type=int, default=64, help="tokens to generate (default 64)")
    parser.add_argument("--repeats", type=int, default=5, help="pairs of runs that are timed (default 5)")
    args = parser.parse_args()
    print(peers.conditions())
    lines = []
    for size in args.size:
        both = build(size)
        lines += [compare(both, size, rows, args.prompt, args.new, args.repeats) for rows in args.rows]
    print(table(("size", "parameters", "rows", "PyTorch tokens/s", "vlm_jax tokens/s", "PyTorch s / vlm_jax s"), lines))


if __name__ == "__main__":
    main()
