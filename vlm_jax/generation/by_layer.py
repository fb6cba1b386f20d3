"""Layers held one by one, and programs compiled in pieces of a few layers: how a CPU decodes a large model.

In a scan over stacked layers XLA's CPU backend first copies a layer's matrices out of the stack. Training does not notice; a
step for one token does little else than read them, and the copies halve the tokens a second. Layers held apart are read where
they lie. But a program with all of them in it compiles the longer the deeper the model is, so a function is cut at its layers
(`layers.stack.piece`): what stands before them, a few layers, and what follows them are compiled, and the program of a few
layers runs as often as it takes. GPUs and TPUs keep the stack and the scan.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core
from jax.sharding import NamedSharding, PartitionSpec

from vlm_jax.layers.stack import PIECE

LEAST = 32 * 2**20  # bytes of language layers; smaller ones stay in the processor's cache, copied or not
STACKS = (("language", "layers"), ("fusion", "layers"))  # what runs for every token

Array = jax.Array


def worth_splitting(params: Any) -> bool:
    leaves = jax.tree.leaves(params["language"]["layers"])
    on_cpu = all(device.platform == "cpu" for device in leaves[0].sharding.device_set)
    return on_cpu and sum(x.nbytes for x in leaves) >= LEAST


def split_layers(params: Any) -> Any:
    """The parameters with the layers of `STACKS` as tuples.

    A stack is freed as soon as its layers are apart: only one parameter is held twice at a time.
    """
    params = dict(params)
    for part, name in STACKS:
        if name in params.get(part, {}):
            params[part] = params[part] | {name: _layers(params[part][name])}
    return params


def restack_layers(params: Any) -> Any:
    """The inverse of `split_layers`: a copy, as large as the model."""
    params = dict(params)
    for part, name in STACKS:
        if isinstance(params.get(part, {}).get(name), tuple):
            params[part] = params[part] | {name: jax.tree.map(lambda *layers: jnp.stack(layers), *params[part][name])}
    return params


def _layers(stack: Any) -> tuple[Any, ...]:
    leaves, tree = jax.tree.flatten(stack)
    split = []
    for leaf in leaves:
        split.append(_split(leaf))
        jax.block_until_ready(split[-1])
        leaf.delete()
    return tuple(jax.tree.unflatten(tree, layer) for layer in zip(*split, strict=True))


def _split(leaf: Array) -> list[Array]:
    """[L, ...] -> L arrays, each on the mesh as the stack is."""
    sharding = leaf.sharding
    if isinstance(sharding, NamedSharding):
        sharding = NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[1:]))
    return jax.jit(lambda x: [x[i] for i in range(x.shape[0])], out_shardings=sharding)(leaf)


class Pieces:
    """`jax.jit` of `fn(params, *args)`, compiled in pieces. Equal pieces are one program.

    Must be called on one mesh only. The parameters are never donated.
    """

    def __init__(self, fn: Callable[..., Any], *, donate_argnums: Sequence[int] = ()) -> None:
        self.fn, self.donated = fn, frozenset(donate_argnums)
        self._params: Any = None  # those that the plans were made for
        self._plans: dict[Any, _Plan] = {}
        self._programs: dict[Any, tuple[Any, Callable[..., Any]]] = {}  # by the jaxpr, which is kept alive

    def __call__(self, params: Any, *args: Any) -> Any:
        if params is not self._params:
            self._params, self._plans = params, {}
        leaves, tree = jax.tree.flatten(args)
        key = (tree, tuple((x.shape, x.dtype, getattr(x, "weak_type", False)) for x in leaves))
        plan = self._plans.get(key)
        if plan is None:
            plan = self._plans[key] = self._plan(params, args)
        return plan.run(leaves)

    def _cache_size(self) -> int:
        """As `jax.jit` has it: how many programs were compiled."""
        return sum(program._cache_size() for _, program in self._programs.values())

    def _plan(self, params: Any, args: tuple[Any, ...]) -> _Plan:
        closed, shape = jax.make_jaxpr(self.fn, return_shape=True)(params, *args)
        fixed = jax.tree.leaves(params)
        owners = [number for number, arg in enumerate(args, 1) for _ in jax.tree.leaves(arg)]
        inputs = closed.jaxpr.invars[len(fixed) :]
        return _Plan.of(
            closed,
            fixed=fixed,
            donated={var for var, owner in zip(inputs, owners, strict=True) if owner in self.donated},
            out_tree=jax.tree.structure(shape),
            program=self._program,
        )

    def _program(self, jaxpr: core.ClosedJaxpr, donated: tuple[int, ...]) -> Callable[..., Any]:
        key = (id(jaxpr), donated)
        if key not in self._programs:
            self._programs[key] = (jaxpr, jax.jit(core.jaxpr_as_fun(jaxpr), donate_argnums=donated))
        return self._programs[key][1]


@dataclasses.dataclass(frozen=True)
class _Call:
    program: Callable[..., Any]
    inputs: list[Any]  # what is always the same; None for the rest
    filled: list[tuple[int, core.Var]]  # the rest
    outputs: list[core.Var]
    dead: list[core.Var]  # what nothing reads after this call


@dataclasses.dataclass(frozen=True)
class _Plan:
    """The calls that do what a jaxpr says, for parameters that stay the same."""

    calls: list[_Call]
    fixed: dict[core.Var, Any]
    inputs: list[core.Var]  # of the jaxpr, without the parameters
    outputs: list[Any]
    out_tree: Any

    @classmethod
    def of(
        cls,
        closed: core.ClosedJaxpr,
        *,
        fixed: list[Array],
        donated: set[core.Var],
        out_tree: Any,
        program: Callable[..., Callable[..., Any]],
    ) -> _Plan:
        """
        Args:
          fixed: values of the first inputs.
          donated: inputs whose memory may be used for outputs.
          program: (jaxpr, numbers of the inputs that are donated) -> what runs it.
        """
        jaxpr = closed.jaxpr
        known = dict(zip(jaxpr.constvars, closed.consts, strict=True)) | dict(zip(jaxpr.invars, fixed, strict=False))
        groups: list[list[Any]] = []
        for eqn in jaxpr.eqns:
            if _is_piece(eqn) or not groups or _is_piece(groups[-1][0]):
                groups.append([])
            groups[-1].append(eqn)
        # Backwards, so that of every variable the last reader is met first.
        needed, calls = {var for var in jaxpr.outvars if isinstance(var, core.Var)}, []
        owned = donated | {var for eqn in jaxpr.eqns if _is_piece(eqn) for var in _made(eqn)}
        reused: dict[int, set[int]] = {}  # by the jaxpr of a piece: what can be donated wherever it is called
        for eqns in reversed(groups):
            made = {var for eqn in eqns for var in eqn.outvars}
            read = dict.fromkeys(var for eqn in eqns for var in eqn.invars if isinstance(var, core.Var) and var not in made)
            dead = [var for var in read if var not in needed and var not in known]
            if _is_piece(eqns[0]):
                inputs, outputs, part = list(eqns[0].invars), list(eqns[0].outvars), eqns[0].params["jaxpr"]
            else:
                inputs, outputs = list(read), [var for eqn in eqns for var in eqn.outvars if var in needed]
                part = core.ClosedJaxpr(core.Jaxpr((), inputs, outputs, eqns), ())
            free = _reused(inputs, outputs, owned.intersection(dead))
            reused[id(part)] = reused.get(id(part), free) & free
            calls.append((part, inputs, outputs, dead))
            needed = (needed - made) | set(read)
        of_var = lambda var: var.val if isinstance(var, core.Literal) else known.get(var)
        runs = [
            _Call(
                program=program(part, tuple(sorted(reused[id(part)]))),
                inputs=[of_var(var) for var in inputs],
                filled=[(place, var) for place, var in enumerate(inputs) if isinstance(var, core.Var) and var not in known],
                outputs=outputs,
                dead=dead,
            )
            for part, inputs, outputs, dead in reversed(calls)
        ]
        return cls(runs, known, jaxpr.invars[len(fixed) :], jaxpr.outvars, out_tree)

    def run(self, args: list[Any]) -> Any:
        values = dict(zip(self.inputs, args, strict=True))
        for call in self.calls:
            inputs = call.inputs.copy()
            for place, var in call.filled:
                inputs[place] = values[var]
            made = call.program(*inputs)
            for var in call.dead:
                del values[var]
            values.update(zip(call.outputs, made, strict=True))
        read = lambda var: var.val if isinstance(var, core.Literal) else self.fixed[var] if var in self.fixed else values[var]
        return jax.tree.unflatten(self.out_tree, map(read, self.outputs))


def _is_piece(eqn: core.JaxprEqn) -> bool:
    return eqn.params.get("name") == PIECE and "jaxpr" in eqn.params


def _made(eqn: core.JaxprEqn) -> list[core.Var]:
    """Outputs of a layer that are arrays of their own, and not one of its inputs handed on."""
    inner = eqn.params["jaxpr"].jaxpr
    return [var for var, of in zip(eqn.outvars, inner.outvars, strict=True) if of not in inner.invars]


def _reused(inputs: list[Any], outputs: list[core.Var], free: set[core.Var]) -> set[int]:
    """Numbers of the inputs whose memory an output of the same shape and type can take."""
    wanted, found = [(var.aval.shape, var.aval.dtype) for var in outputs], set()
    for number, var in enumerate(inputs):
        if isinstance(var, core.Var) and var in free and inputs.count(var) == 1:
            kind = (var.aval.shape, var.aval.dtype)
            if kind in wanted:
                wanted.remove(kind)
                found.add(number)
    return found
