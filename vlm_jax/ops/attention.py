"""Scaled dot-product attention: one function, and behind it whatever serves a call best.

A kernel is a file with `attend` and `unsupported_reason` (why it does not serve a call, "" if it does). The first of `KERNELS`
that serves is taken; the last one serves everything.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
from collections.abc import Iterator

import jax

from vlm_jax.ops import attention_chunked, attention_cudnn, attention_dense, attention_splash
from vlm_jax.ops.masks import Alibi, Mask

Array = jax.Array

KERNELS = {
    "splash": attention_splash,
    "cudnn": attention_cudnn,
    "dense": attention_dense,
    "chunked": attention_chunked,
}


@dataclasses.dataclass(frozen=True)
class Choice:
    """Which kernel serves calls of some shapes, and why those before it in `KERNELS` do not."""

    queries: tuple[int, ...]  # [B, T, N, H]
    keys: tuple[int, ...]  # [B, S, K, H]
    kernel: str
    reasons: tuple[str, ...]

    def __str__(self) -> str:
        rows, tokens, heads, width = self.queries
        of_keys = f"{self.keys[1]} keys of {self.keys[2]} heads"
        return f"{self.kernel} attention of {rows} x {tokens} queries, {heads} heads of {width}, over {of_keys}"


_CHOICES: contextvars.ContextVar[dict[Choice, None] | None] = contextvars.ContextVar("choices", default=None)


@contextlib.contextmanager
def recorded_choices() -> Iterator[dict[Choice, None]]:
    """The choices of the calls that are traced meanwhile, each once, in their order."""
    before = _CHOICES.set(choices := {})
    try:
        yield choices
    finally:
        _CHOICES.reset(before)


def attend(q: Array, k: Array, v: Array, mask: Mask | None = None, alibi: Alibi | None = None) -> Array:
    """Attention of `q` over `k`, `v`.

    Args:
      q: [B, T, N, H].
      k, v: [B, S, K, H] with N a multiple of K (grouped-query attention, Ainslie et al. 2023).
      mask: None: every query sees every key.
      alibi: what is added to the logits.

    Returns:
      [B, T, N, H] in the type of `v`. A query that sees no key gets exactly 0.
    """
    reasons = []
    for name, kernel in KERNELS.items():
        reason = kernel.unsupported_reason(q, k, v, mask, alibi)
        if not reason:
            if (choices := _CHOICES.get()) is not None:
                choices[Choice(q.shape, k.shape, name, tuple(reasons))] = None
            return kernel.attend(q, k, v, mask, alibi)
        reasons.append(f"{name}: {reason}")
    raise AssertionError("the last kernel serves every call")
