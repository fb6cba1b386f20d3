"""A model's generation, compiled: prompts in, tokens out. What is asked and answered, as text, is the generator's business."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from vlm_jax.batch import Batch
from vlm_jax.generation import beam, decode
from vlm_jax.generation.by_layer import Pieces, restack_layers, split_layers, worth_splitting
from vlm_jax.models.vlm import VisionLanguageModel

Array = jax.Array

STEPS = 32  # so many at a time, before the host looks whether all rows are done
WHOLE = 16  # layers that one program may have, held one by one: it is the fastest, and compiles the longer the deeper it is


class Programs:
    """A model with its parameters on a mesh, and the compiled functions that generate with it.

    The parameters are taken over, unless `take_over` is False: where layers are held one by one, the stacks are freed.

    Attributes:
      by_layer: whether layers are held one by one; in_pieces: whether functions are compiled in pieces, see `by_layer.py`.
      held: the parameters as the compiled functions read them.
      by_function: what was compiled for each function that `call` was given.
    """

    def __init__(self, model: VisionLanguageModel, params: Any, *, mesh: Mesh, take_over: bool = True) -> None:
        self.model, self.mesh = model, mesh
        self.by_layer = take_over and worth_splitting(params)
        self.held = split_layers(params) if self.by_layer else params
        self.in_pieces = self.by_layer and len(self.held["language"]["layers"]) > WHOLE
        self._begin = jax.jit(decode.begin, static_argnames="slots")
        self._begin_beams = jax.jit(beam.begin, static_argnames=("room", "beams"))
        self.by_function: dict[Callable[..., Any], Any] = {}

    @property
    def params(self) -> Any:
        """Nested dicts, layers stacked, as every other place has them; a copy where layers are held one by one."""
        return restack_layers(self.held)

    def with_params(self, held: Any) -> Programs:
        """The same programs with other parameters, as `held` has them: of the same shapes, nothing is compiled anew."""
        other = copy.copy(self)
        other.held = held
        if self.in_pieces:  # which are planned for one set of parameters
            other.by_function = {}
        return other

    def compiled(self) -> int:
        """How many programs were compiled so far."""
        return sum(program._cache_size() for program in (self._begin, self._begin_beams, *self.by_function.values()))

    def call(self, fn: Callable[..., Any], *args: Any, donate: tuple[int, ...] = (), **fixed: Any) -> Any:
        """`fn(model, params, *args, **fixed)`, compiled.

        Args:
          donate: numbers of `args`, counted from 1, whose memory may be used for what is returned.
          fixed: the same at every call.
        """
        if fn not in self.by_function:
            compiled = Pieces if self.in_pieces else jax.jit
            self.by_function[fn] = compiled(functools.partial(fn, self.model, **fixed), donate_argnums=donate)
        with jax.set_mesh(self.mesh):
            return self.by_function[fn](self.held, *args)

    def begin(
        self, prompts: Batch, row_settings: decode.RowSettings, constraints: decode.Constraints, *, slots: int
    ) -> tuple[decode.State, decode.NextTokens]:
        """Reads the prompts: the state with the first new token of every row, see `decode.begin`."""
        prefilled = self.call(decode.prefill, prompts)
        with jax.set_mesh(self.mesh):
            state, next_tokens = self._begin(prefilled, row_settings, constraints, slots=slots)
        return jax.tree.map(_normalised_sharding, state), next_tokens

    def more(
        self, state: decode.State, constraints: decode.Constraints, *, most: int
    ) -> tuple[decode.State, decode.NextTokens]:
        """Up to `most` further tokens of every row, fewer where all rows are done before: [B, new] on the host. A row must run.

        Args:
          most: at most `STEPS`.
        """
        if not self.in_pieces:
            state, next_tokens, done = self.call(decode.steps, state, constraints, np.int32(most), donate=(1,), room=STEPS)
            return state, jax.tree.map(lambda x: x[:, : int(done)], jax.device_get(next_tokens))
        columns = []
        while len(columns) < most and np.any(jax.device_get(state.reasons) == decode.RUNNING):
            state, next_tokens = self.call(decode.step, state, constraints, donate=(1,))
            columns.append(next_tokens)
        return state, jax.tree.map(lambda *parts: np.stack(parts, axis=1), *jax.device_get(columns))

    def search(
        self,
        prompts: Batch,
        search: beam.BeamSettings,
        constraints: decode.Constraints,
        limits: Array,
        *,
        room: int,
        beams: int,
    ) -> beam.Generated:
        """The best answer of every prompt by beam search, on the host; see `beam.begin`."""
        prefilled = self.call(decode.prefill, prompts)
        with jax.set_mesh(self.mesh):
            state = self._begin_beams(prefilled, search, constraints, limits, room=room, beams=beams)
        state = jax.tree.map(_normalised_sharding, state)
        while not np.all(jax.device_get(state.over)):
            state = self.call(beam.step, state, search, constraints, limits, donate=(1,))
        return jax.device_get(beam.best(state))


def _normalised_sharding(x: Array) -> Array:
    """With its sharding spelt as the outputs of a step have it: another spelling would compile the step again."""
    if not isinstance(x.sharding, NamedSharding):
        return x
    mesh, spec = x.sharding.mesh, []
    for entry in x.sharding.spec:
        axes = tuple(axis for axis in (entry if isinstance(entry, tuple) else (entry,)) if axis and mesh.shape[axis] > 1)
        spec.append(axes[0] if len(axes) == 1 else axes or None)
    while spec and spec[-1] is None:
        spec.pop()
    return jax.device_put(x, NamedSharding(mesh, PartitionSpec(*spec)))
