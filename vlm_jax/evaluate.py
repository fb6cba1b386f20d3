"""Runs evaluators on a run's checkpoint: those of its configuration, or any others.

    python -m vlm_jax.evaluate --checkpoint=runs/a
    python -m vlm_jax.evaluate --checkpoint=runs/a --evaluator=ranking --evaluator=ranking:blank=True,name=blind
    python -m vlm_jax.evaluate --checkpoint=runs/a --evaluator=generation:metric=cider,max_new_tokens=24 --step=500
    python -m vlm_jax.evaluate --checkpoint=runs/a --evaluator=samples:examples=9 --pictures=sheets

`--evaluator` is a kind of `vlm_jax/config/evaluator.py`, or the name of one in the run's configuration, and settings of it;
`--source=stamps:folder=...` takes the held-out examples from elsewhere. The last line is JSON: the step, and every metric as
`NAME_METRIC`. The run's folder is not written.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from pathlib import Path
from typing import Any

from absl import app, flags
from absl import logging as absl_logging
from PIL import Image

from vlm_jax.config import RunConfig
from vlm_jax.config_dict import from_dict, kind_of, to_dict
from vlm_jax.errors import RequestError


def evaluate(
    checkpoint: str | Path,
    evaluators: list[str] | tuple[str, ...] = (),
    *,
    source: str = "",
    step: int | None = None,
    mesh: str | None = None,
    pictures: str | Path | None = None,
) -> dict[str, float]:
    """The metrics of a run's checkpoint, and its step.

    Args:
      evaluators: `kind:setting=value,...`; none: those of the run's configuration.
      source: where held-out examples are taken from, likewise; "": the run's own.
      step: None: the newest.
      mesh: as in `vlm_jax.load`.
      pictures: the folder that pictures and texts are written into.

    Raises:
      ValueError: no such checkpoint, evaluator or setting, or data that cannot be read; the message says which.
    """
    import jax
    import jax.numpy as jnp

    from vlm_jax.api import parse_mesh
    from vlm_jax.data.pipeline import build_source
    from vlm_jax.training.checkpoint import load_run
    from vlm_jax.training.evaluator import EVALUATORS, RunParts
    from vlm_jax.training.params import split
    from vlm_jax.training.processors import run_processor
    from vlm_jax.training.run_folder import read_config
    from vlm_jax.training.step import Trainer, TrainState

    folder = Path(checkpoint).expanduser()
    config = _config(read_config(folder), evaluators, source)
    held_out = build_source(config.data, "eval")
    device_mesh = parse_mesh(mesh)
    with jax.set_mesh(device_mesh):
        trainer = Trainer(config, device_mesh)
        processor = run_processor(config.data, folder)
        parts = RunParts(config=config, trainer=trainer, processor=processor, source=held_out, held_out=held_out)
        made = {of.label: EVALUATORS[type(of)](of, parts) for of in config.evaluators}
        run = load_run(folder, device_mesh, step=step)
        trained, frozen = split(run.params, trainer.rules)
        zero = jnp.zeros((), jnp.int32)
        state = TrainState(zero + run.step, trained, frozen, None, zero, zero)
        found: dict[str, float] = {"step": run.step}
        for label, evaluator in made.items():
            evaluation = evaluator.evaluate(state)
            found |= {f"{label}_{name}": float(evaluation.metrics[name]) for name in evaluator.metrics}
            print(f"{label}: {evaluation.line or evaluation.metrics}")
            if pictures:
                _write(Path(pictures).expanduser(), label, evaluation)
    return found


def _config(config: RunConfig, evaluators: list[str] | tuple[str, ...], source: str) -> RunConfig:
    values = to_dict(config)
    known = {of.label: to_dict(of) for of in config.evaluators}
    if evaluators:
        values["evaluators"] = tuple(kind_of(text, known) for text in evaluators)
    elif not known:
        raise RequestError("the run's configuration has no evaluators: name one, --evaluator=generation for example")
    if source:
        values["data"]["source"] = kind_of(source)
    config = from_dict(RunConfig, values)
    labels = [of.label for of in config.evaluators]
    if twice := {label for label in labels if labels.count(label) > 1}:
        raise RequestError(f"two evaluators are called {min(twice)!r}: give one another name, {min(twice)}:name=other")
    return config


def _write(folder: Path, label: str, evaluation: Any) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    name = lambda part: "-".join(filter(None, (label, part)))
    for part, picture in evaluation.pictures.items():
        Image.fromarray(picture).save(folder / f"{name(part)}.png")
    for part, text in evaluation.texts.items():
        (folder / f"{name(part)}.md").write_text(text + "\n")


def main(argv: list[str]) -> int:
    if len(argv) > 1:
        sys.exit(f"vlm_jax.evaluate: unknown arguments {argv[1:]}; see --help")
    absl_logging.set_verbosity(absl_logging.ERROR)  # Orbax logs every file it reads
    absl_logging.get_absl_handler().setFormatter(logging.Formatter())  # the messages alone
    logging.getLogger("vlm_jax").setLevel(logging.INFO)
    from vlm_jax import runtime

    runtime.prepare()
    given = flags.FLAGS
    try:
        found = evaluate(
            given.checkpoint,
            given.evaluator,
            source=given.source,
            step=given.step,
            mesh=given.mesh,
            pictures=given.pictures,
        )
    except (ValueError, OSError) as error:
        print(f"vlm_jax.evaluate: {error}", file=sys.stderr)
        return 1
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    flags.DEFINE_string("checkpoint", None, "A run of train.py: its --workdir.", required=True)
    flags.DEFINE_multi_string("evaluator", [], "KIND, or KIND:SETTING=VALUE,...; several times for several.")
    flags.DEFINE_string("source", "", "Held-out examples from elsewhere: KIND:SETTING=VALUE,...")
    flags.DEFINE_integer("step", None, "Which checkpoint; the newest otherwise.")
    flags.DEFINE_string("mesh", None, "How the model is sharded, as 'tensor=8'; one device otherwise.")
    flags.DEFINE_string("pictures", None, "A folder for the pictures and texts of evaluators.")
    app.run(main)
