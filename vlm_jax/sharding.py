"""The mesh, and the one table that says how parameters and activations lie on it.

A parameter names its logical axes where it is made; `RULES` maps each to mesh axes. A dimension that its mesh axes do not
divide is replicated, and the start-up table says so.
"""

from __future__ import annotations

import contextvars
import dataclasses
import functools
import math
import zlib
from collections.abc import Callable, Collection
from typing import Any

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from vlm_jax.config import MeshConfig
from vlm_jax.paths import by_path

AXES = ("data", "fsdp", "tensor")

# logical axis -> mesh axes, tried together
RULES: dict[str, tuple[str, ...]] = {
    # parameters
    "layers": (),
    "embed": ("fsdp",),
    "vocab": ("tensor",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "head": (),
    "mlp": ("tensor",),
    # Every device has a slice of every expert, by "mlp": its work is the same whichever experts the tokens choose, any number
    # of experts will do, and no token changes its device.
    "experts": (),
    "norm": (),
    "pixels": (),
    "positions": (),
    "latents": (),
    "projection": (),
    "rank": (),
    # activations
    "batch": ("data", "fsdp"),
    "length": (),
}


Initializer = Callable[[jax.Array, tuple[int, ...]], jax.Array]  # (key, shape)


@flax.struct.dataclass
class Named(nn.meta.AxisMetadata):
    """A parameter boxed with the logical names of its axes.

    Flax's own boxes look their names up in a rule context and constrain by themselves; this one only carries the names.
    """

    value: Any
    names: tuple[str | None, ...] = flax.struct.field(pytree_node=False)
    inputs: int = flax.struct.field(pytree_node=False, default=0)  # axes of a kernel that `Linear` contracts; 0: no kernel
    init: Initializer | None = flax.struct.field(pytree_node=False, default=None)  # None: of a box that `named` did not make

    def unbox(self) -> Any:
        return self.value

    def replace_boxed(self, val: Any) -> Named:
        return self.replace(value=val)

    def add_axis(self, index: int, params: dict[Any, Any]) -> Named:
        names = list(self.names)
        names.insert(index, params[nn.meta.PARTITION_NAME])
        return self.replace(names=tuple(names), init=self.init and _each_layer(self.init))

    def remove_axis(self, index: int, params: dict[Any, Any]) -> Named:
        names = list(self.names)
        del names[index]
        return self.replace(names=tuple(names))


# Whether only shapes are asked for: most of the time of tracing an initial model goes into random numbers that nobody wants.
_SHAPES_ALONE = contextvars.ContextVar("shapes_alone", default=False)


def named(init: Initializer, *names: str | None, inputs: int = 0) -> Callable[..., Named]:
    """An initialiser whose result carries the logical `names` of its axes, `inputs` as `Named` has it, and `init`."""

    def boxed(key: jax.Array, shape: tuple[int, ...]) -> Named:
        value = jnp.zeros(shape, jnp.float32) if _SHAPES_ALONE.get() else init(key, shape)
        return Named(value, names, inputs, init)

    return boxed


def _each_layer(init: Initializer) -> Initializer:
    return lambda key, shape: jax.vmap(lambda key: init(key, shape[1:]))(jax.random.split(key, shape[0]))


def stacked_init(init: Callable[[jax.Array], Any], length: int) -> Callable[[jax.Array], Any]:
    """The initialiser of `length` copies of a layer: what `init` makes, each with a leading axis `layers`."""

    def stack(key: jax.Array) -> Any:
        if _SHAPES_ALONE.get():
            params = jax.tree.map(lambda leaf: jnp.zeros((length, *leaf.shape), leaf.dtype), init(key))
        else:
            params = jax.vmap(init)(jax.random.split(key, length))
        return nn.meta.add_axis(params, 0, {nn.meta.PARTITION_NAME: "layers"})

    return stack


def unboxed(tree: Any) -> Any:
    """The values of a tree of boxes."""
    return jax.tree.map(lambda box: box.value, tree, is_leaf=lambda x: isinstance(x, Named))


def boxed_params(model: nn.Module) -> Any:
    """Shapes, types and axis names of a model's parameters; nothing is computed, so no device need be there.

    Args:
      model: of `models/`, or a `Vit`: it has an `example`.
    """
    return _boxed_shapes.eval_shape(model)


@functools.partial(jax.jit, static_argnums=0)  # so that the shapes of a model are kept
def _boxed_shapes(model: nn.Module) -> Any:
    before = _SHAPES_ALONE.set(True)
    try:
        return model.init(jax.random.key(0), *model.example())["params"]
    finally:
        _SHAPES_ALONE.reset(before)


def make_mesh(config: MeshConfig, devices: list[jax.Device] | None = None) -> Mesh:
    """The mesh of a run over all devices (of all processes).

    Raises:
      ValueError: the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = [config.data, config.fsdp, config.tensor]
    if sizes.count(-1) > 1 or any(size < 1 and size != -1 for size in sizes):
        raise ValueError(f"mesh {dict(zip(AXES, sizes, strict=True))}: sizes are positive, and at most one is -1")
    known = math.prod(size for size in sizes if size != -1)
    if -1 in sizes and len(devices) % known == 0:
        sizes[sizes.index(-1)] = len(devices) // known
    if math.prod(sizes) != len(devices):
        raise ValueError(
            f"mesh {dict(zip(AXES, sizes, strict=True))} needs {known} devices or a divisor of them, "
            f"but there are {len(devices)}: change --config.mesh.data, .fsdp or .tensor"
        )
    # pjit's way: XLA propagates the shardings, `constrain` guides it.
    types = (AxisType.Auto,) * len(AXES)
    slices = len({getattr(device, "slice_index", None) for device in devices})
    if slices == 1:
        return jax.make_mesh(tuple(sizes), AXES, axis_types=types, devices=devices)
    # A network joins the slices, which is slow: of what is sent over `data`, the gradients, there is least.
    if sizes[0] % slices:
        raise ValueError(
            f"the devices are {slices} slices that a network joins, and mesh.data={sizes[0]} does not divide into them: set "
            f"--config.mesh.data to {slices} or a multiple"
        )
    inside, across = (sizes[0] // slices, *sizes[1:]), (slices, 1, 1)
    return Mesh(mesh_utils.create_hybrid_device_mesh(inside, across, devices), AXES, axis_types=types)


@dataclasses.dataclass(frozen=True)
class Placement:
    """Where one array lies, and what could not be sharded."""

    spec: PartitionSpec
    replicated: tuple[str, ...]  # a reason for each dimension that did not divide


def place(names: tuple[str | None, ...], shape: tuple[int, ...], mesh: Mesh) -> Placement:
    """The mesh axes of an array whose dimensions carry the logical `names`.

    Raises:
      ValueError: a name that `RULES` does not know, or a number of names that is not that of the dimensions.
    """
    if len(names) != len(shape):
        raise ValueError(f"logical axes {names} do not fit shape {shape}")
    axes: list[Any] = []
    reasons = []
    for name, size in zip(names, shape, strict=True):
        if name is not None and name not in RULES:
            raise ValueError(f"unknown logical axis {name!r}; sharding.RULES knows {sorted(RULES)}")
        wanted = tuple(axis for axis in (RULES[name] if name else ()) if mesh.shape[axis] > 1)
        parts = math.prod(mesh.shape[axis] for axis in wanted)
        if size % parts:
            reasons.append(f"{name}={size} is not divisible by {'*'.join(wanted)}={parts}")
            wanted = ()
        axes.append(wanted[0] if len(wanted) == 1 else (wanted or None))
    return Placement(PartitionSpec(*axes), tuple(reasons))


def shards(name: str, size: int) -> int:
    """Into how many shards the mesh of the context (`jax.set_mesh`) cuts an axis of an array."""
    mesh = jax.sharding.get_abstract_mesh()
    spec = PartitionSpec(None) if mesh.empty else place((name,), (size,), mesh).spec
    axes = spec[0] if isinstance(spec[0], tuple) else (spec[0],)
    return math.prod(mesh.shape[axis] for axis in axes if axis)


def place_tree(boxed: Any, mesh: Mesh) -> Any:
    """A `Placement` for each leaf of a (possibly abstract) tree whose parameters are boxed with their logical names."""

    def leaf(box: Any) -> Placement:
        if isinstance(box, Named):
            return place(box.names, box.value.shape, mesh)
        return place((None,) * box.ndim, box.shape, mesh)

    return jax.tree.map(leaf, boxed, is_leaf=lambda x: isinstance(x, Named))


def shardings_of(placements: Any, mesh: Mesh) -> Any:
    """Placements -> `NamedSharding`s."""
    return jax.tree.map(
        lambda placement: NamedSharding(mesh, placement.spec),
        placements,
        is_leaf=lambda x: isinstance(x, Placement),
    )


def initial_params(model: nn.Module, key: jax.Array, *, mesh: Mesh, without: Collection[str] = ()) -> dict[str, jax.Array]:
    """Untrained parameters by path, each made in its shards; the model itself is not run for them.

    Args:
      without: paths of those that are not needed.
    """
    boxed = boxed_params(model)
    boxes = {path: box for path, box in by_path(boxed).items() if path not in without}
    number = lambda path: np.uint32(zlib.crc32(path.encode()))  # of a parameter, whatever else the model has

    def draw(key: jax.Array) -> dict[str, jax.Array]:
        return {path: box.init(jax.random.fold_in(key, number(path)), box.value.shape) for path, box in boxes.items()}

    placed = by_path(shardings_of(place_tree(boxed, mesh), mesh))
    return jax.jit(draw, out_shardings={path: placed[path] for path in boxes})(key)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows over `data` and `fsdp`; any number of further axes."""
    return NamedSharding(mesh, PartitionSpec(("data", "fsdp")))


def batch_shards(mesh: Mesh) -> int:
    """Into how many shards `batch_sharding` cuts the rows."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def constrain(x: jax.Array, *names: str | None) -> jax.Array:
    """Tells XLA how an activation lies on the mesh of the context (`jax.set_mesh`); nothing without a mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return x
    return jax.lax.with_sharding_constraint(x, place(names, x.shape, mesh).spec)


def target_platform() -> str:
    """What the mesh of the context consists of, also of devices that are not there: "cpu", "gpu" or "tpu"."""
    mesh = jax.sharding.get_abstract_mesh()
    device = None if mesh.empty else mesh.abstract_device
    return jax.default_backend() if device is None else device.platform
