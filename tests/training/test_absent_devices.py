"""A `Trainer` for devices that are not there: shapes, shardings and the compiled step of a TPU topology."""

import os
import subprocess
import sys

import pytest

pytest.importorskip("libtpu", reason="pip install 'vlm_jax[tpu]' compiles for TPUs that are not here")

SCRIPT = """
import jax
from jax.experimental import topologies
from tests.tiny import tiny_run
from vlm_jax.config import MeshConfig
from vlm_jax.sharding import make_mesh
from vlm_jax.training.step import Trainer, zeros_batch

devices = topologies.get_topology_desc("v5e:2x4", platform="tpu").devices
mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2), devices)
config = tiny_run()
with jax.set_mesh(mesh):
    trainer = Trainer(config, mesh)
    batch = jax.eval_shape(lambda: zeros_batch(config, config.data.rows))
    compiled = trainer.train_step.lower(trainer.abstract_state, batch).compile()
    print(compiled.memory_analysis().argument_size_in_bytes, "bytes of arguments")
    assert "all-reduce" in compiled.as_text()
"""


def test_the_training_step_of_a_tpu_topology_compiles():
    settings = {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "PYTHONPATH": os.getcwd()}
    ran = subprocess.run([sys.executable, "-c", SCRIPT], env=os.environ | settings, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0 and "bytes of arguments" in ran.stdout, ran.stderr[-2000:]
