"""Tokens handed to Python while the compiled loop still runs.

The loop calls back through `jax.experimental.io_callback`, in order, which JAX offers on one device only: on a mesh of
several devices text comes when it is whole.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import io_callback

Array = jax.Array
OnTokens = Callable[[np.ndarray, np.ndarray], bool]  # (tokens [B], which rows ran [B]) -> whether to end everything

# The program knows a stream by its number, which is an array: another stream needs no other program.
_OPEN: dict[int, Stream] = {}
_NUMBERS = itertools.count()


class Stream:
    """An open stream; `with` closes it. An error raised by `on_tokens` ends the loop and is raised by `check`."""

    def __init__(self, on_tokens: OnTokens) -> None:
        self.on_tokens, self.error = on_tokens, None
        self.number = next(_NUMBERS) % 2**31

    def __enter__(self) -> Stream:
        _OPEN[self.number] = self
        return self

    def __exit__(self, *_: Any) -> None:
        del _OPEN[self.number]

    def check(self) -> None:
        if self.error is not None:
            raise self.error


def deliver(number: Array, tokens: Array, runs: Array) -> Array:
    """Called in the compiled loop: hands on a token of each row. Returns [] bool, whether to end."""
    return io_callback(_receive, jax.ShapeDtypeStruct((), jnp.bool_), number, tokens, runs, ordered=True)


def _receive(number: Any, tokens: Any, runs: Any) -> np.ndarray:
    stream = _OPEN.get(int(number))
    if stream is None or stream.error is not None:
        return np.asarray(True)
    try:
        return np.asarray(bool(stream.on_tokens(np.asarray(tokens), np.asarray(runs))))
    except BaseException as error:  # raised again where Python waits for the result
        stream.error = error
        return np.asarray(True)
