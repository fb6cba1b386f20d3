"""Trains a vision-language model from a recipe.

    python train.py --config=configs/flamingo_easyvqa.py --workdir=runs/a
    python train.py --config=configs/flamingo_easyvqa.py --workdir=runs/b --config.optimizer.lr=3e-4 --config.mesh.tensor=8

Every leaf of the recipe can be overridden. Run the same command again to resume from the newest checkpoint of `workdir`.
"""

import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path

from vlm_jax.training.interrupt import Interrupted, handle_signals

if __name__ == "__main__":
    handle_signals()  # the imports below take a moment

from absl import app, flags
from absl import logging as absl_logging
from ml_collections import config_flags

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # silences transformers' "PyTorch was not found"

CONFIG = config_flags.DEFINE_config_file("config", None, "The recipe: a file in configs/.", lock_config=True)
WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run's checkpoints and metrics.")
DISTRIBUTED = flags.DEFINE_bool("distributed", False, "Train in several processes; detected on TPU pods, SLURM and MPI.")
COORDINATOR = flags.DEFINE_string("coordinator", None, "Coordinator address, host:port, if it cannot be detected.")
PROCESSES = flags.DEFINE_integer("processes", None, "Number of processes, if it cannot be detected.")
PROCESS = flags.DEFINE_integer("process", None, "Index of this process, if it cannot be detected.")
PEER_TIMEOUT = flags.DEFINE_integer("peer_timeout", 20, "Seconds after which a silent process ends the others.", lower_bound=2)
flags.mark_flags_as_required(["config", "workdir"])


def main(argv: list[str]) -> int:
    if len(argv) > 1:
        sys.exit(f"train.py: unknown arguments {argv[1:]}; see --help")
    absl_logging.set_verbosity(absl_logging.WARNING)  # Orbax logs every file it writes
    logging.getLogger("vlm_jax").setLevel(logging.INFO)
    from vlm_jax import runtime
    from vlm_jax.training.peers import Peers

    runtime.prepare()
    if not (DISTRIBUTED.value or COORDINATOR.value):
        return run(lambda error: None)[0]
    process = (COORDINATOR.value, PROCESSES.value, PROCESS.value)
    log_file = Path(WORKDIR.value).expanduser() / "train.log"
    peers = Peers(*process, timeout=PEER_TIMEOUT.value, log_file=log_file)
    code, together = run(peers.explain)
    peers.leave(code, together=together)
    return code


def run(explain: Callable[[Exception], None]) -> tuple[int, bool]:
    """Trains. Gives the exit status, and whether all processes end here; `explain` is called before an error is printed."""
    # After the distributed start: these may touch the devices.
    from jax.errors import JaxRuntimeError

    from vlm_jax.config import RunConfig
    from vlm_jax.config_dict import from_config_dict
    from vlm_jax.errors import first_line
    from vlm_jax.training.loop import train

    try:
        result = train(from_config_dict(RunConfig, CONFIG.value), WORKDIR.value)
    except (ValueError, OSError, FloatingPointError, JaxRuntimeError) as error:
        explain(error)
        print(f"train.py: {first_line(error) if isinstance(error, JaxRuntimeError) else error}", file=sys.stderr)
        logging.disable()  # of what the threads of a failed run still say
        return 1, False
    except Interrupted as interrupted:
        return 128 + interrupted.signal, False
    except KeyboardInterrupt:
        print("train.py: interrupted again before the step was saved; run the same command again to resume", file=sys.stderr)
        return 130, False
    return (0 if result.signal is None else 128 + result.signal), True


if __name__ == "__main__":
    app.run(main)
