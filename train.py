"""Trains a vision-language model from a recipe.

    python train.py --config=configs/flamingo_easyvqa.py --workdir=runs/a
    python train.py --config=configs/flamingo_easyvqa.py --workdir=runs/b --config.optimizer.lr=3e-4 --config.mesh.tensor=8

Every leaf of the recipe can be overridden. The same command, given again, resumes from the newest checkpoint of `workdir`.
"""

import logging
import os
import sys

from absl import app, flags
from absl import logging as absl_logging
from ml_collections import config_flags

from vlm_jax.training.interrupt import heard

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # it says at every start that PyTorch is not there

CONFIG = config_flags.DEFINE_config_file("config", None, "The recipe: a file in configs/.", lock_config=True)
WORKDIR = flags.DEFINE_string("workdir", None, "Where the run keeps its checkpoints and metrics.")
DISTRIBUTED = flags.DEFINE_bool("distributed", False, "One of several processes; a TPU pod, SLURM and MPI tell the rest.")
COORDINATOR = flags.DEFINE_string("coordinator", None, "host:port of process 0, where the cluster does not tell it.")
PROCESSES = flags.DEFINE_integer("processes", None, "How many processes there are, likewise.")
PROCESS = flags.DEFINE_integer("process", None, "Which of them this is, likewise.")
flags.mark_flags_as_required(["config", "workdir"])


def main(argv: list[str]) -> int:
    if len(argv) > 1:
        sys.exit(f"train.py: unknown arguments {argv[1:]}; see --help")
    absl_logging.set_verbosity(absl_logging.WARNING)  # Orbax tells every file it writes
    logging.getLogger("vlm_jax").setLevel(logging.INFO)
    import jax

    from vlm_jax import runtime
    from vlm_jax.config import RunConfig
    from vlm_jax.config_dict import from_config_dict

    runtime.prepare()
    if DISTRIBUTED.value or COORDINATOR.value:
        jax.distributed.initialize(COORDINATOR.value, PROCESSES.value, PROCESS.value)
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
    with heard():
        app.run(main)
