"""Trains a vision-language model from a recipe.

    python train.py --config=configs/flamingo_easyvqa.py --workdir=runs/a
    python train.py --config=configs/flamingo_easyvqa.py --workdir=runs/b --config.optimizer.lr=3e-4 --config.mesh.tensor=8

Every leaf of the recipe can be overridden. Run the same command again to resume from the newest checkpoint of `workdir`.
"""

import logging
import os
import sys

from absl import app, flags
from absl import logging as absl_logging
from ml_collections import config_flags

from vlm_jax.training.interrupt import handle_signals

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # silences transformers' "PyTorch was not found"

CONFIG = config_flags.DEFINE_config_file("config", None, "The recipe: a file in configs/.", lock_config=True)
WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run's checkpoints and metrics.")
DISTRIBUTED = flags.DEFINE_bool("distributed", False, "Train in several processes; detected on TPU pods, SLURM and MPI.")
COORDINATOR = flags.DEFINE_string("coordinator", None, "Coordinator address, host:port, if it cannot be detected.")
PROCESSES = flags.DEFINE_integer("processes", None, "Number of processes, if it cannot be detected.")
PROCESS = flags.DEFINE_integer("process", None, "Index of this process, if it cannot be detected.")
flags.mark_flags_as_required(["config", "workdir"])


def main(argv: list[str]) -> int:
    if len(argv) > 1:
        sys.exit(f"train.py: unknown arguments {argv[1:]}; see --help")
    absl_logging.set_verbosity(absl_logging.WARNING)  # Orbax logs every file it writes
    logging.getLogger("vlm_jax").setLevel(logging.INFO)
    import jax

    from vlm_jax import runtime
    from vlm_jax.config import RunConfig
    from vlm_jax.config_dict import from_config_dict

    runtime.prepare()
    if DISTRIBUTED.value or COORDINATOR.value:
        jax.distributed.initialize(
            coordinator_address=COORDINATOR.value, num_processes=PROCESSES.value, process_id=PROCESS.value
        )
    # After the distributed start: the imports below may touch the devices.
    from vlm_jax.training.loop import NonFiniteLoss, train

    try:
        result = train(from_config_dict(RunConfig, CONFIG.value), WORKDIR.value)
    except (ValueError, OSError, NonFiniteLoss) as error:
        print(f"train.py: {error}", file=sys.stderr)
        return 1
    if result.signal is not None:
        return 128 + result.signal
    return 0


if __name__ == "__main__":
    with handle_signals():
        app.run(main)
