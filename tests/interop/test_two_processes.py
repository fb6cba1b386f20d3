"""A published folder read by two processes: each reads the bytes of its own shards, and together they hold what one holds."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
from folders import load
from test_llava import llava

from vlm_jax.training.checkpoint import fingerprint

SCRIPT = """
import json, sys
import jax
address, index, folder = sys.argv[1:]
jax.distributed.initialize(address, 2, int(index))
from vlm_jax.api import parse_mesh
from vlm_jax.interop.published import open_published
from vlm_jax.interop.files.safetensors_files import SafetensorsFiles
from vlm_jax.training.checkpoint import fingerprint

read, whole = SafetensorsFiles.read, 0
def counted(self, name, index):
    global whole
    part = read(self, name, index)
    whole += part.nbytes
    return part
SafetensorsFiles.read = counted
mesh = parse_mesh("fsdp=4")
with jax.set_mesh(mesh):
    params = open_published(folder).load_params(mesh)
    print(json.dumps({"read": whole, "fingerprint": int(jax.jit(fingerprint)(params))}))
"""


def test_each_reads_its_own(tmp_path):
    llava(tmp_path)
    params = load(tmp_path).params
    total = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        address = f"localhost:{probe.getsockname()[1]}"
    environment = os.environ | {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
        "JAX_PLATFORMS": "cpu",
        "JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo",
        "PYTHONPATH": str(Path(__file__).parents[2]),
    }
    command = lambda index: [sys.executable, "-c", SCRIPT, address, str(index), str(tmp_path)]
    both = [
        subprocess.Popen(command(index), env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for index in range(2)
    ]
    for process in both:
        output, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors
        told = json.loads(output.splitlines()[-1])
        assert told["fingerprint"] == int(jax.jit(fingerprint)(params))
        # A half, and what is not sharded.
        assert told["read"] < 0.6 * total
