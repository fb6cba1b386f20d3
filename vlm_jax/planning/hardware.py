"""Devices that are not here: what vendors publish of them, and topologies that programs are compiled for.

A TPU's topology comes from its compiler (`libtpu`), CPUs are simulated, and a GPU is described by its data sheet: XLA does not
compile for a GPU that is not there, so the program is that of as many CPUs, and only its figures are the GPU's.
"""

from __future__ import annotations

import dataclasses
import math
import os
import re
from typing import Any

import jax

from vlm_jax.training.flops import PEAKS

GB = 1e9


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chip:
    """What a vendor's data sheet says of one device.

    Attributes:
      flops: FLOP/s of dense bfloat16 products; memory: bytes; bandwidth: bytes/s of its memory.
      link: bytes/s that it sends to others of its slice or node, all links together, in one direction.
      network: bytes/s that it sends to other slices or nodes; clock: Hz of the core whose cycles the compiler estimates.
    """

    name: str
    flops: float
    memory: float
    bandwidth: float
    link: float
    network: float = 6.25 * GB
    clock: float | None = None


CHIPS = {
    "v4": Chip(name="TPU v4", flops=PEAKS["TPU v4"], memory=32 * 2**30, bandwidth=1228 * GB, link=300 * GB, clock=1.05e9),
    "v5e": Chip(name="TPU v5e", flops=PEAKS["TPU v5e"], memory=16 * 2**30, bandwidth=819 * GB, link=200 * GB, clock=1.5e9),
    "v5p": Chip(name="TPU v5p", flops=PEAKS["TPU v5"], memory=95 * 2**30, bandwidth=2765 * GB, link=600 * GB, clock=1.75e9),
    "v6e": Chip(name="TPU v6e", flops=PEAKS["TPU v6e"], memory=32 * 2**30, bandwidth=1640 * GB, link=448 * GB, clock=1.75e9),
    "a100": Chip(name="NVIDIA A100 80GB", flops=PEAKS["A100"], memory=80 * 2**30, bandwidth=2039 * GB, link=300 * GB),
    "h100": Chip(
        name="NVIDIA H100 SXM", flops=PEAKS["H100"], memory=80 * 2**30, bandwidth=3350 * GB, link=450 * GB, network=50 * GB
    ),
    "h200": Chip(name="NVIDIA H200", flops=PEAKS["H200"], memory=141 * GB, bandwidth=4800 * GB, link=450 * GB, network=50 * GB),
    "l4": Chip(name="NVIDIA L4", flops=PEAKS["L4"], memory=24 * 2**30, bandwidth=300 * GB, link=32 * GB),
}
TPUS = ("v4", "v5e", "v5p", "v6e")


@dataclasses.dataclass(frozen=True)
class Target:
    """What a plan is for.

    Attributes:
      devices: what programs are compiled for; chip: None: of simulated CPUs, nothing is known.
      slices: of a TPU, that a slower network joins.
    """

    text: str
    devices: list[Any]
    chip: Chip | None
    slices: int


def parse_topology(text: str) -> Target:
    """`v5p:4x4x4`, `v5e:16x16:slices=2`, `cpu:8`, `h100:16`, or `gpu:8:memory=80e9,flops=1e15,bandwidth=3e12,link=4e11`.

    For more than one CPU or GPU it must be called before JAX makes its devices.

    Raises:
      ValueError: an unknown device or shape, or a TPU without `libtpu`; the message says what is expected.
    """
    kind, _, rest = text.partition(":")
    shape, _, options = rest.partition(":")
    settings = dict(part.split("=", 1) for part in options.split(",") if "=" in part)
    if kind in TPUS:
        return _tpu(text, kind, shape, int(settings.get("slices", 1)))
    if not shape.isdigit() or kind not in ("cpu", "gpu", *CHIPS):
        raise ValueError(
            f"--topology={text}: expected a TPU and its shape ({', '.join(TPUS)}: v5p:4x4x4), cpu:8, or a GPU and a number "
            f"({', '.join(name for name in CHIPS if name not in TPUS)}: h100:16)"
        )
    count = int(shape)
    chip = CHIPS.get(kind)
    if kind == "gpu":
        missing = {"memory", "flops", "bandwidth", "link"} - settings.keys()
        if missing:
            raise ValueError(f"--topology={text}: {', '.join(sorted(missing))} missing: gpu:8:memory=80e9,flops=1e15,...")
        chip = Chip(name="GPU", **{name: float(value) for name, value in settings.items()})
    return Target(text, simulated(count), chip, 1)


def simulated(count: int) -> list[Any]:
    """As many CPU devices.

    Raises:
      ValueError: JAX has made fewer already.
    """
    devices = jax.devices("cpu")
    if len(devices) < count:
        raise ValueError(
            f"{count} simulated devices are needed and JAX has made {len(devices)}: set "
            f"XLA_FLAGS=--xla_force_host_platform_device_count={count} before Python starts"
        )
    return devices[:count]


def _tpu(text: str, kind: str, shape: str, slices: int) -> Target:
    from jax.experimental import topologies

    if not re.fullmatch(r"\d+(x\d+){1,2}", shape):
        raise ValueError(f"--topology={text}: expected the shape of a slice, as {kind}:{'4x4' if kind[-1] == 'e' else '4x4x4'}")
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # it would look for the metadata server of a cloud's machine
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    options = dict(chips_per_host_bounds=_host_bounds(kind, shape))
    if slices > 1:
        options["num_slices"] = slices
    try:
        topology = topologies.get_topology_desc(platform="tpu", topology_name=f"{kind}:{shape}", **options)
    except (RuntimeError, ValueError, jax.errors.JaxRuntimeError) as error:
        first = str(error).splitlines()[0]
        raise ValueError(
            f"--topology={text}: {first}. Programs for TPUs are compiled by libtpu: pip install 'vlm_jax[tpu]', and set "
            "JAX_PLATFORMS=cpu where there is no TPU"
        ) from error
    return Target(text, list(topology.devices), CHIPS[kind], slices)


def _host_bounds(kind: str, shape: str) -> tuple[int, ...]:
    """Chips of a host along each axis: 2 x 2 x 1, or fewer of a smaller slice."""
    sizes = [int(size) for size in shape.split("x")]
    return tuple(math.gcd(size, 2) if axis < 2 else 1 for axis, size in enumerate(sizes)) + (1,) * (3 - len(sizes))
