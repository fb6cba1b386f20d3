"""Eight simulated devices for every test; set before jax starts. And a run that several files ask."""

import atexit
import ctypes
import gc
import os
import shutil
import signal
import sys
import tempfile
from pathlib import Path

import pytest

# The programs are tiny, and compiling them is most of a test's time: machine code is not optimised and not split between
# threads, and the older emitters of fused loops are used, which compile a training step in a third of the time.
QUICK = "--xla_backend_optimization_level=0 --xla_cpu_parallel_codegen_split_count=1"
QUICK += " --xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8 {QUICK}"
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Where in the Python code an operation was written costs time when a program is lowered.
os.environ.setdefault("JAX_TRACEBACK_IN_LOCATIONS_LIMIT", "0")
# PyTorch's threads wait for each other in a loop: where two workers have two each, tiny products take ten times as long.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# What a start keeps for the next one (`~/.cache`: token stores, compiled programs) is kept apart from the user's own.
if "VLM_JAX_TESTS" not in os.environ:  # pytest's workers share the folder of the process that starts them
    os.environ["VLM_JAX_TESTS"] = os.environ["HOME"] = tempfile.mkdtemp(prefix="vlm_jax-tests-")
    atexit.register(shutil.rmtree, os.environ["HOME"], ignore_errors=True)
# A program that another test or worker has compiled is not compiled again.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", f"{os.environ['HOME']}/compiled")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.15")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")


class Memory:
    """Compiled programs are dropped when a worker has grown: each holds megabytes, and few serve another test."""

    MORE = 1 << 30  # bytes a worker may grow by

    def __init__(self) -> None:
        self.limit = 2 * self.MORE

    def check(self) -> None:
        if "jax" not in sys.modules or self._resident() < self.limit:
            return
        sys.modules["jax"].clear_caches()
        gc.collect()
        if sys.platform == "linux":
            ctypes.CDLL("libc.so.6").malloc_trim(0)  # what was freed goes back to the system
        self.limit = max(2 * self.MORE, self._resident() + self.MORE)

    @staticmethod
    def _resident() -> int:
        status = Path("/proc/self/statm")
        return int(status.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if status.exists() else 0


MEMORY = Memory()


@pytest.fixture(autouse=True)
def bounded_memory():
    yield
    MEMORY.check()


@pytest.fixture
def within_a_minute():
    """A test that waits for ever fails instead."""

    def expired(*_):
        raise AssertionError("it still waits after a minute")

    before = signal.signal(signal.SIGALRM, expired)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture(scope="module")
def runs_on_one_device():
    """Eight simulated devices take turns on a core, and their programs compile for longer."""
    from tests.tiny import mesh_of
    from vlm_jax.training import loop

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "make_mesh", lambda config: mesh_of(1, 1, 1))
        yield


@pytest.fixture(scope="session")
def run(tmp_path_factory) -> Path:
    """The folder of a run that was saved before its first step, its gates open, with pictures 0.png, 1.png, ... in data/."""
    import jax

    from tests.tiny import initial_state, mesh_of, tiny_run, write_data
    from vlm_jax.processing.tokenizer import train_tokenizer
    from vlm_jax.training.checkpoint import Checkpoints
    from vlm_jax.training.run_folder import write_or_check_config
    from vlm_jax.training.step import Trainer

    folder = tmp_path_factory.mktemp("runs") / "a"
    config, mesh = tiny_run(), mesh_of(1, 1, 1)
    write_or_check_config(folder, config)
    train_tokenizer(["which colour? red green blue"] * 9, config.data.vocab_size).save(folder / "tokenizer")
    with jax.set_mesh(mesh):
        checkpoints = Checkpoints(folder, 1, 0)
        checkpoints.save(initial_state(Trainer(config, mesh)), 4)
        checkpoints.wait()
        checkpoints.close()
    write_data(folder / "data", 4)
    return folder
