"""Reading a published LLaVA of 2 GB on 8 simulated devices, beside transformers' `from_pretrained`: seconds and peak memory.

    python benchmarks/load.py

A folder of random weights is written first (float32, several files and an index, as on the hub). Each side then reads it in a
process of its own. The simulated devices lie in the host's memory: peak memory is the parameters and what reading needs beside
them, which is told too, with the largest parameter (a stack of all layers) and the largest published tensor to compare with.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SIZES = dict(
    hidden_size=1536,
    intermediate_size=4096,
    num_hidden_layers=14,
    num_attention_heads=16,
    num_key_value_heads=16,
    vocab_size=32064,
)
VISION = dict(
    hidden_size=768, intermediate_size=3072, num_hidden_layers=8, num_attention_heads=12, image_size=224, patch_size=16
)


def write_folder(folder: Path) -> int:
    """Random weights under the published names. Returns their bytes."""
    import numpy as np
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig

    from vlm_jax.families import llava
    from vlm_jax.interop.engine import abstract_params
    from vlm_jax.interop.files import safetensors_files
    from vlm_jax.interop.plan import Problems, resolve
    from vlm_jax.interop.table import published_name
    from vlm_jax.models.vlm import VisionLanguageModel
    from vlm_jax.paths import by_path

    published = LlavaConfig(
        vision_config=CLIPVisionConfig(**VISION),
        text_config=LlamaConfig(**SIZES),
        architectures=["LlavaForConditionalGeneration"],
    )
    published.save_pretrained(folder)
    config = llava.config_from_hf(published)
    shapes = {path: leaf.shape for path, leaf in by_path(abstract_params(VisionLanguageModel(config))).items()}
    rng = np.random.default_rng(0)
    tensors = (
        (published_name(name, numbers), rng.standard_normal(one.shape_of(part), np.float32) * np.float32(0.02))
        for one in resolve(llava.table(config, published), shapes, Problems())
        for numbers in one.places()
        for part, name in enumerate(one.row.published)
    )
    return safetensors_files.write(folder, tensors, shard_bytes=10**9)


def memory(most: bool = False) -> int:
    """Bytes of memory that this process holds, or held at most since `forget`."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(rf"{'VmHWM' if most else 'VmRSS'}:\s+(\d+)", status)[1]) * 1024


def forget() -> int:
    """Starts the measurement of the most that is held. Returns the bytes now."""
    Path("/proc/self/clear_refs").write_text("5")
    return memory()


def ours(folder: Path, mesh: str) -> dict[str, float]:
    import jax
    from transformers import AutoConfig

    from vlm_jax.api import parse_mesh
    from vlm_jax.families import llava
    from vlm_jax.interop.engine import load_params
    from vlm_jax.interop.files.folder import open_weights
    from vlm_jax.models.vlm import VisionLanguageModel
    from vlm_jax.sharding import boxed_params

    published = AutoConfig.from_pretrained(folder)
    config = llava.config_from_hf(published)
    placed, boxed = parse_mesh(mesh), boxed_params(VisionLanguageModel(config))
    before, began = forget(), time.perf_counter()
    source = open_weights(folder)
    params = load_params(source, llava.table(config, published), boxed, placed)
    seconds = time.perf_counter() - began
    leaves = jax.tree.leaves(params)
    return {
        "seconds": seconds,
        "peak": memory(most=True) - before,
        "parameters": sum(leaf.nbytes for leaf in leaves),
        "largest": max(leaf.nbytes for leaf in leaves),
        "tensor": max(4 * math.prod(tensor.shape) for tensor in source.tensors.values()),
    }


def theirs(folder: Path) -> dict[str, float]:
    import torch
    from transformers import LlavaForConditionalGeneration

    torch.set_num_threads(2)
    before, began = forget(), time.perf_counter()
    model = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    # The files are mapped into memory: a sum reads what `from_pretrained` may have left on disk.
    sum(float(parameter.sum()) for parameter in model.parameters())
    seconds = time.perf_counter() - began
    return {"seconds": seconds, "peak": memory(most=True) - before, "parameters": sum(p.nbytes for p in model.parameters())}


def in_process(side: str, folder: Path, mesh: str) -> dict[str, float]:
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, __file__, "--side", side, "--folder", str(folder), "--mesh", mesh]
    out = subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout
    return json.loads(out.strip().splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mesh", default="fsdp=4,tensor=2", help="of the 8 devices (default %(default)s)")
    parser.add_argument("--repeats", type=int, default=3, help="pairs of runs (default 3)")
    parser.add_argument("--side", choices=("ours", "theirs"), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        print(json.dumps(ours(args.folder, args.mesh) if args.side == "ours" else theirs(args.folder)))
        return
    with tempfile.TemporaryDirectory() as folder:
        size = write_folder(Path(folder))
        print(f"{size / 1e9:.2f} GB in {len(list(Path(folder).glob('*.safetensors')))} files, mesh {args.mesh}, 2 cores\n")
        pairs = [
            (in_process("theirs", Path(folder), args.mesh), in_process("ours", Path(folder), args.mesh))
            for _ in range(args.repeats)
        ]
    gb = lambda value: f"{value / 1e9:.2f}"
    print("                                  seconds  peak GB  parameters GB  beside them GB")
    for name, side in (("transformers from_pretrained", 0), ("vlm_jax load_params", 1)):
        runs = [pair[side] for pair in pairs]
        seconds, most = (statistics.median(run[key] for run in runs) for key in ("seconds", "peak"))
        print(
            f"{name:33} {seconds:7.1f}  {gb(most):>7}  {gb(runs[0]['parameters']):>13}  {gb(most - runs[0]['parameters']):>14}"
        )
    last = pairs[-1][1]
    print(f"\nlargest parameter {gb(last['largest'])} GB, largest published tensor {gb(last['tensor'])} GB")


if __name__ == "__main__":
    main()
