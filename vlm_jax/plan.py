"""What a run needs on hardware that is not here: does it fit, how is it laid out, how fast can it be.

    python -m vlm_jax.plan --config=configs/llava15_stage2.py:7b --topology=v5p:4x4x4 --config.mesh.fsdp=-1 --config.mesh.data=1
    python -m vlm_jax.plan --config=configs/flamingo_80b.py --topology=v5p:8x8x8 --search
    python -m vlm_jax.plan --config=configs/llava15_stage2.py:7b --topology=v5e:2x4 --config.mesh.tensor=8 --generate=8x2048
    python -m vlm_jax.plan --config=configs/flamingo_smollm2.py --topology=cpu:8

The very update that `train.py` runs, or the prefill and the steps of `infer.py`, are compiled from shapes alone; no weights and
no data are read. `--topology` is a TPU and its shape (v4, v5e, v5p, v6e: `pip install 'vlm_jax[tpu]'`; `v5p:4x4x4:slices=2` for
two that a network joins), `cpu:N`, or a GPU by name and number (`h100:64`) or by its figures
(`gpu:8:memory=80e9,flops=1e15,bandwidth=3e12,link=4e11`), whose program is that of as many CPUs.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import logging
import os
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from absl import app, flags
from absl import logging as absl_logging
from ml_collections import config_flags

from vlm_jax.config import MeshConfig, RunConfig
from vlm_jax.errors import first_line

if TYPE_CHECKING:  # JAX is imported once its settings are made
    from vlm_jax.planning.hardware import Target


def plan(
    config: RunConfig, topology: str | Target, *, generate: tuple[int, int] | None = None, images: int = 1, new: int = 128
) -> list[dict[str, Any]]:
    """The figures of a run's programs on a topology, see `planning.report.figures`: of the update, or of prefill and decoding.

    Args:
      generate: prompts at once, and tokens of each; None: the update is planned.
      images: of each prompt; new: tokens that there is room for behind it.

    Raises:
      ValueError: an unknown topology, or a mesh that it does not have.
    """
    from vlm_jax.planning import programs
    from vlm_jax.planning.hardware import parse_topology
    from vlm_jax.planning.report import figures
    from vlm_jax.sharding import make_mesh

    target = parse_topology(topology) if isinstance(topology, str) else topology
    mesh = make_mesh(config.mesh, target.devices)
    dtype = config.dtype if config.dtype != "auto" else ("float32" if target.chip is None else "bfloat16")
    config = dataclasses.replace(config, dtype=dtype)
    if generate is None:
        return [figures(programs.training(config, mesh), target)]
    rows, tokens = generate
    both = programs.generation(config, mesh, rows=rows, tokens=tokens, images=images, new=new, dtype=dtype)
    return [figures(one, target) for one in both]


def candidates(config: RunConfig, devices: int) -> Iterator[RunConfig]:
    """What `--search` tries: meshes of all devices, rematerialisation, and micro-batches."""
    sizes = [2**power for power in range(devices.bit_length()) if devices % 2**power == 0]
    for tensor, fsdp in itertools.product([size for size in sizes if size <= 16], sizes):
        if devices % (tensor * fsdp):
            continue
        data = devices // (tensor * fsdp)
        for remat, accumulate in itertools.product(("full", "dots"), (1, 2, 4)):
            if all(one.data.rows % (data * fsdp * accumulate) == 0 for one in config.data_sets):
                optimizer = dataclasses.replace(config.optimizer, accumulate=accumulate)
                mesh = MeshConfig(data=data, fsdp=fsdp, tensor=tensor)
                yield dataclasses.replace(config, mesh=mesh, remat=remat, optimizer=optimizer)


def _prepare(topology: str) -> None:
    """Settings that JAX reads when it makes its devices."""
    count = topology.split(":")[1] if ":" in topology else ""
    os.environ |= {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1"}
    if count.isdigit():
        flags_now = os.environ.get("XLA_FLAGS", "")
        os.environ["XLA_FLAGS"] = f"{flags_now} --xla_force_host_platform_device_count={count}".strip()


def _pair(text: str) -> tuple[int, int]:
    rows, _, tokens = text.partition("x")
    if not (rows.isdigit() and tokens.isdigit()):
        raise ValueError(f"--generate={text}: expected prompts x tokens, as 8x2048")
    return int(rows), int(tokens)


def main(argv: list[str]) -> int:
    if len(argv) > 1:
        sys.exit(f"vlm_jax.plan: unknown arguments {argv[1:]}; see --help")
    absl_logging.set_verbosity(absl_logging.WARNING)
    logging.getLogger("vlm_jax").setLevel(logging.INFO)
    _prepare(TOPOLOGY.value)
    from vlm_jax.config_dict import from_config_dict
    from vlm_jax.planning.report import print_plan

    try:
        config = from_config_dict(RunConfig, CONFIG.value)
        generate = _pair(GENERATE.value) if GENERATE.value else None
        if SEARCH.value:
            found = search(config, TOPOLOGY.value)
        else:
            print(f"compiling for {TOPOLOGY.value} ...", file=sys.stderr, flush=True)
            found = plan(config, TOPOLOGY.value, generate=generate, images=IMAGES.value, new=NEW.value)
    except ValueError as error:
        print(f"vlm_jax.plan: {error}", file=sys.stderr)
        return 2
    if JSON.value:
        print(json.dumps(found))
        return 0
    for one in found:
        print_plan(one, config, tokens=TOKENS.value)
    return 0


def search(config: RunConfig, topology: str) -> list[dict[str, Any]]:
    """The fastest of the candidates that fit, after a line of each."""
    from jax.errors import JaxRuntimeError

    from vlm_jax.planning.hardware import parse_topology

    target = parse_topology(topology)
    tried = list(candidates(config, len(target.devices)))
    best: dict[str, Any] | None = None
    for number, one in enumerate(tried, 1):
        name = f"{number}/{len(tried)}  {one.mesh.data}x{one.mesh.fsdp}x{one.mesh.tensor} remat={one.remat}"
        name += f" accumulate={one.optimizer.accumulate}"
        try:
            (found,) = plan(one, target)
        except (ValueError, JaxRuntimeError) as error:
            print(f"{name}: {first_line(error)}", file=sys.stderr, flush=True)
            continue
        fits = "fits" if found.get("fits", True) else "does not fit"
        time = f"{found['step_seconds']:.3f} s, MFU {found['mfu']:.1%}" if "mfu" in found else ""
        print(f"{name}: {found['bytes']['all'] / 2**30:.1f} GiB, {fits}  {time}", file=sys.stderr, flush=True)
        if found.get("fits", True) and (best is None or found.get("step_seconds", 0) < best.get("step_seconds", 0)):
            best = found
    if best is None:
        raise ValueError(f"--topology={topology}: none of {len(tried)} meshes, policies and micro-batches fits")
    return [best]


if __name__ == "__main__":
    CONFIG = config_flags.DEFINE_config_file("config", None, "The recipe: a file in configs/.", lock_config=True)
    TOPOLOGY = flags.DEFINE_string("topology", None, "Devices: v5p:4x4x4, v5e:16x16:slices=2, cpu:8, h100:64.")
    GENERATE = flags.DEFINE_string("generate", "", "Plan prefill and decoding of so many prompts x tokens, as 8x2048.")
    IMAGES = flags.DEFINE_integer("images", 1, "Pictures of a prompt, with --generate.")
    NEW = flags.DEFINE_integer("new", 128, "Tokens that there is room for behind a prompt, with --generate.")
    TOKENS = flags.DEFINE_float("tokens", None, "Tokens to train on: device-hours are told.")
    SEARCH = flags.DEFINE_bool(
        "search", False, "Try meshes, rematerialisation and micro-batches; the fastest that fits is shown."
    )
    JSON = flags.DEFINE_bool("json", False, "One line of JSON instead of tables.")
    flags.mark_flags_as_required(["config", "topology"])
    app.run(main)
