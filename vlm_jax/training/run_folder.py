"""A run's folder: what stands in it, its configuration, and who may write it.

RUN/config.json         what the run was started with
RUN/tokenizer/          the tokenizer, as transformers saves it; or
RUN/processor/          a published checkpoint's own processing (`processors.py`)
RUN/published/          of the published checkpoint it was started from, everything but the weights
RUN/checksums.sha256    of these files: a run is read only if they are as they were written
RUN/checkpoints/STEP/   Orbax: `state` (sharded arrays) and `meta` (place in the data, fingerprints)
RUN/damaged/STEP/       checkpoints that could not be read, moved aside
RUN/metrics.jsonl       a line a step; RUN/tensorboard/ the same for TensorBoard
RUN/train.log           warnings and errors with their tracebacks
RUN/train.lock          held by the train.py that writes the folder
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from vlm_jax.config import RunConfig
from vlm_jax.config_dict import from_dict, to_dict, to_named_dict
from vlm_jax.files import CHECKSUMS, JsonError, check_checksums, lock, parse_json, read_regular, write_checksums
from vlm_jax.training.processors import PROCESSOR, TOKENIZER

PUBLISHED, LOG = "published", "train.log"

# What may change between a start and its continuation: nothing that changes the numbers.
MAY_CHANGE_ON_RESUME = {
    "mesh",
    "remat",
    "log_every",
    "eval_every",
    "eval_rows",
    "evaluators",
    "best_by",
    "save_every",
    "keep_last",
    "keep_best",
    "init_from",
    "init_parts",
    "data.workers",
    "data.cache_dir",
    "data.processor",  # it is kept in the run's folder
    "pickles",
    "accept_changed_data",
    "data.check_pictures",
    "data.source.cache_dir",
}


class CheckpointError(ValueError):
    """A run's folder that is missing, damaged, or of another configuration."""


@contextlib.contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Makes the folder, and keeps other runs out of it; of the processes of one run the first does.

    Raises:
      CheckpointError: it cannot be written, or another train.py writes it.
    """
    with contextlib.ExitStack() as held:
        if jax.process_index() == 0:
            try:
                folder.mkdir(parents=True, exist_ok=True)
                file = held.enter_context((folder / "train.lock").open("a"))
                lock(file, "another train.py is writing it: wait for it, or choose another --workdir")
            except FileExistsError:
                raise CheckpointError(f"--workdir={folder} is a file: choose another one") from None
            except OSError as error:
                raise CheckpointError(f"--workdir={folder}: {error.strerror or error}") from error
        yield


def differences(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[str]:
    """`name: old -> new` for every leaf that differs, those in `MAY_CHANGE_ON_RESUME` left out."""
    found = []
    for key in sorted(old.keys() | new.keys()):
        name = f"{prefix}{key}"
        before, after = old.get(key), new.get(key)
        of_any = re.sub(r"^data\.source\.members\.[^.]+\.", "data.", re.sub(r"^accumulated\.[^.]+\.", "", name))
        if of_any in MAY_CHANGE_ON_RESUME or before == after:
            continue
        if isinstance(before, dict) and isinstance(after, dict):
            found += differences(before, after, f"{name}.")
        else:
            found.append(f"{name}: {before!r} -> {after!r}")
    return found


def read_config(folder: str | Path) -> RunConfig:
    """The configuration of a run.

    Raises:
      CheckpointError: there is no such folder, it is not a run, or one of another version; ChecksumError: a file was changed.
    """
    path = Path(folder).expanduser() / "config.json"
    if not path.parent.is_dir():
        raise CheckpointError(f"no checkpoint at {path.parent}: there is no such folder")
    if not path.is_file():
        raise CheckpointError(f"no checkpoint at {path.parent}: it holds no config.json, so it is not a run's --workdir")
    advice = f"Restore it from a copy; if it was changed on purpose, remove {path.with_name(CHECKSUMS)}"
    check_checksums(path.parent, advice=advice)
    try:
        found = parse_json(read_regular(path))
        if not isinstance(found, dict):
            raise JsonError("is not an object")
        return from_dict(RunConfig, found)
    except (ValueError, OSError) as error:
        raise CheckpointError(
            f"{path} is damaged, or was written by another version of vlm_jax, and only that version can read it: {error}"
        ) from error


def write_or_check_config(folder: Path, config: RunConfig) -> None:
    """Writes the configuration of a new run, or compares that of an old one with `config`.

    Raises:
      CheckpointError: the run was started with another configuration; the message shows the difference.
    """
    path = folder / "config.json"
    named = lambda config: json.loads(json.dumps(to_named_dict(config)))
    if path.exists():
        # Fields that an older version did not have are at their defaults.
        changed = differences(named(read_config(folder)), named(config))
        if changed:
            raise CheckpointError(
                f"{folder} was started with another configuration:\n  " + "\n  ".join(changed) + "\n"
                "Continue with the old values, or start in another --workdir "
                f"(with --config.init_from={folder} to take its parameters along)."
            )
    elif jax.process_index() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part")
        part.write_text(json.dumps(to_dict(config), indent=2) + "\n")
        part.rename(path)


def unseal(folder: Path) -> None:
    """Before a run that has no checkpoint yet is made anew."""
    if jax.process_index() == 0:
        (folder / CHECKSUMS).unlink(missing_ok=True)


def seal(folder: Path) -> None:
    """Writes the checksums of what a run keeps beside its checkpoints; `read_config` compares them."""
    if jax.process_index() == 0 and not (folder / CHECKSUMS).exists():
        parts = (folder / name for name in (PROCESSOR, TOKENIZER, PUBLISHED))
        files = [folder / "config.json", *(file for part in parts for file in part.rglob("*") if file.is_file())]
        write_checksums(folder, [file.relative_to(folder).as_posix() for file in files])
