"""Eight simulated devices for every test; set before jax starts."""

import os
import tempfile

# Unoptimised machine code: the programs are tiny, and compiling them is most of a test's time.
FLAGS = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {FLAGS}"
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# What a start keeps for the next one (`~/.cache`: token stores, compiled programs) is kept apart from the user's own.
os.environ["HOME"] = tempfile.mkdtemp(prefix="vlm_jax-tests-")
