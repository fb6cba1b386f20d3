"""Adapters in a tree of parameters: `.../query/lora/NAME/{a,b,scale}` beside `.../query/kernel`.

With the leading axis of a stack (the layers) where the kernel has it:

    kernel  [*inputs, *outputs]
    a       [*inputs, rank]
    b       [rank, *outputs]
    scale   []   alpha / rank (or alpha / sqrt(rank)), never trained
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from vlm_jax.ops.quantised import dequantise
from vlm_jax.paths import Params, by_path, nested
from vlm_jax.sharding import Named

Array = jax.Array
PATH = re.compile(r"(?P<module>.+)/lora/(?P<name>[^/]+)/(?P<leaf>.+)")
NAME = re.compile(r"[A-Za-z0-9_.-]+")


def boxes_of(adapter: str, box: Named, rank: int) -> dict[str, Named]:
    """Of a kernel's box, those of its adapter, whose path is `adapter`."""
    lead = int(box.names[0] == "layers")
    ends = lead + box.inputs
    names, shape = box.names, box.value.shape
    made = lambda names, shape: Named(jax.ShapeDtypeStruct(shape, jnp.float32), names)
    return {
        f"{adapter}/a": made((*names[:ends], "rank"), (*shape[:ends], rank)),
        f"{adapter}/b": made((*names[:lead], "rank", *names[ends:]), (*shape[:lead], rank, *shape[ends:])),
        f"{adapter}/scale": made(names[:lead], shape[:lead]),
    }


def without_adapters(params: Params, keep: Collection[str] = ()) -> Params:
    """The same arrays without adapters, but those named in `keep`; layers may be tuples, as in `generation/by_layer.py`."""
    if isinstance(params, tuple):
        return tuple(without_adapters(layer, keep) for layer in params)
    if not isinstance(params, Mapping):
        return params
    kept = {name: without_adapters(part, keep) for name, part in params.items() if name != "lora"}
    if left := {name: part for name, part in params.get("lora", {}).items() if name in keep}:
        kept["lora"] = left
    return kept


def with_adapters(params: Params, adapters: Params) -> Params:
    """The parameters and `adapters`, a tree of them alone and of parameters to replace; layers may be tuples, and get theirs of
    the stack."""
    if isinstance(params, tuple):
        return tuple(with_adapters(layer, jax.tree.map(lambda leaf, i=i: leaf[i], adapters)) for i, layer in enumerate(params))
    if not isinstance(params, Mapping):
        return adapters
    merged = {name: with_adapters(params[name], part) if name in params else part for name, part in adapters.items()}
    # A whole kernel in the place of an int8 one has no scales.
    kept = {name: part for name, part in params.items() if name != "kernel_scale" or "kernel" not in adapters}
    return kept | merged


def only_adapters(params: Params, names: Collection[str] | None = None) -> Params:
    """The adapters alone, of these names or all; parameters as they are in every other place, layers stacked."""
    flat = by_path(params)
    found = {path: PATH.fullmatch(path) for path in flat}
    return nested({path: flat[path] for path, m in found.items() if m and (names is None or m["name"] in names)})


def names_of(params: Params) -> tuple[str, ...]:
    """The names of the adapters, in the order they are met; layers may be tuples."""
    if isinstance(params, tuple):
        params = params[0] if params else {}
    if not isinstance(params, Mapping):
        return ()
    inside = (name for key, part in params.items() if key != "lora" for name in names_of(part))
    return tuple(dict.fromkeys([*params.get("lora", {}), *inside]))


def dequantised(params: Params, modules: Collection[str] | None = None) -> Params:
    """With int8 kernels, of these linear maps or all, as float32 and without their scales; layers stacked."""
    flat = by_path(params)
    for path in [path for path in flat if path.endswith("/kernel_scale")]:
        module = path.removesuffix("/kernel_scale")
        if modules is None or module in modules:
            flat[f"{module}/kernel"] = dequantise(flat[f"{module}/kernel"], flat.pop(path))
    return nested(flat)


def merged(params: Params) -> Params:
    """With every adapter added to its kernel, in the kernel's type: W + scale A B. An int8 kernel becomes float32."""
    found = {(m["module"], m["name"]) for path in by_path(params) if (m := PATH.fullmatch(path))}
    flat = by_path(dequantised(params, {module for module, _ in found}))
    for module, name in sorted(found):
        leaves = (flat.pop(f"{module}/lora/{name}/{leaf}") for leaf in ("a", "b", "scale"))
        flat[f"{module}/kernel"] = _added(flat[f"{module}/kernel"], *leaves)
    return nested(flat)


def _added(kernel: Array, a: Array, b: Array, scale: Array) -> Array:
    lead = scale.shape
    matrices = [x.astype(jnp.float32) for x in (a.reshape(*lead, -1, a.shape[-1]), b.reshape(*lead, a.shape[-1], -1))]
    change = scale[..., None, None] * jnp.matmul(*matrices, precision="highest")
    return (kernel.astype(jnp.float32) + change.reshape(kernel.shape)).astype(kernel.dtype)


def cast(params: Params, dtype: Any) -> Params:
    """In another type, but int8 kernels, and scales, which stay as they are."""
    fixed = lambda path: path.endswith("/kernel_scale") or (PATH.fullmatch(path) and path.endswith("/scale"))
    flat = by_path(params)
    return nested({p: x if fixed(p) or x.dtype == jnp.int8 else x.astype(dtype) for p, x in flat.items()})
