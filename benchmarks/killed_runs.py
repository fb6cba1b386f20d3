"""Each kind of training, killed at random steps by kill -9 and resumed, beside an undisturbed run: every line must be equal.

    python benchmarks/killed_runs.py --kills 3
    python benchmarks/killed_runs.py --only lora dpo

Kinds: stage2 (an image's questions share its prefix), cached (features of the frozen vision encoder on disk), lora (with
dropout, and an int8 base), contrastive (ring, gradient caching), dpo (a frozen copy as the reference), sets (a mixture, and a
set that is accumulated). The runs are tiny ones on this machine's devices, through train.py. This file is also their recipe.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_collections

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "interop")]

from tests.tiny import tiny_run, write_data  # noqa: E402
from tests.training.pairs import get_config as towers  # noqa: E402
from tests.training.pairs import write_pairs  # noqa: E402
from vlm_jax.config import (  # noqa: E402
    EasyVqaConfig,
    JsonLinesConfig,
    LoraConfig,
    MemberConfig,
    MixtureConfig,
    ParamRule,
    PreferenceConfig,
    RunConfig,
    SetConfig,
)
from vlm_jax.config_dict import from_config_dict, to_config_dict  # noqa: E402

replace = dataclasses.replace
FOLDER = "KILLED_RUNS"  # the variable that names where data are
# Two devices, so that there is something to exchange; and quickly compiled, as the tests' programs are.
FLAGS = (
    "--xla_force_host_platform_device_count=2 --xla_backend_optimization_level=0 "
    "--xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters"
)
STEPS = 24
FROZEN_VISION = ParamRule(pattern="^vision", frozen=True)


def _base(folder: Path) -> RunConfig:
    data = str(folder / "squares" / "data.jsonl")
    run = tiny_run(steps=STEPS, log_every=1, eval_every=8, save_every=5)
    sets = replace(run.data, source=JsonLinesConfig(train=data, eval=data), cache_dir=str(folder / "cache"), workers=1)
    return replace(run, data=sets, optimizer=replace(run.optimizer, rules=(FROZEN_VISION,)))


def stage2(folder: Path) -> RunConfig:
    run = _base(folder)
    source = EasyVqaConfig(cache_dir=str(folder / "tfds"))
    return replace(run, data=replace(run.data, source=source, share_prefix=True, tokens=128), eval_rows=8)


def cached(folder: Path) -> RunConfig:
    run = _base(folder)
    return replace(run, data=replace(run.data, cache_features=True))


def lora(folder: Path) -> RunConfig:
    run = _base(folder)
    rules = (
        ParamRule(pattern="/lora/"),
        FROZEN_VISION,
        ParamRule(pattern="^language", frozen=True, frozen_dtype="int8"),
    )
    adapters = (LoraConfig(pattern="^language/layers/", rank=2, alpha=4.0, dropout=0.2),)
    return replace(run, adapters=adapters, optimizer=replace(run.optimizer, rules=rules))


def contrastive(folder: Path) -> RunConfig:
    data = str(folder / "pairs" / "data.jsonl")
    run = from_config_dict(RunConfig, towers())
    sets = replace(run.data, source=JsonLinesConfig(train=data, eval=data), cache_dir=str(folder / "cache"), workers=1)
    return replace(run, data=sets, steps=STEPS, eval_every=8, save_every=5)


def dpo(folder: Path) -> RunConfig:
    run, data = _base(folder), str(folder / "squares" / "answers.jsonl")
    sets = replace(run.data, source=JsonLinesConfig(train=data, eval=data), pairs=True, tokens=64)
    return replace(run, data=sets, objective=PreferenceConfig(beta=0.5))


def sets(folder: Path) -> RunConfig:
    run = _base(folder)
    member = lambda name, weight: MemberConfig(name=name, source=run.data.source, weight=weight)
    mixed = replace(run.data, source=MixtureConfig(members=(member("a", 0.5), member("b", 3.0))))
    other = SetConfig(name="other", data=replace(run.data, rows=16, tokens=24, images=1), weight=0.2)
    return replace(run, data=mixed, accumulated=(other,))


KINDS: dict[str, Callable[[Path], RunConfig]] = {one.__name__: one for one in (stage2, cached, lora, contrastive, dpo, sets)}


def get_config(kind: str) -> ml_collections.ConfigDict:
    return to_config_dict(KINDS[kind](Path(os.environ[FOLDER])))


def write_all(folder: Path) -> None:
    records = [json.loads(line) for line in write_data(folder / "squares", 24).read_text().splitlines()]
    write_pairs(folder / "pairs")
    colours = ["red", "green", "blue", "black"]
    answers = [
        {"image": record["image"], "question": "which colour?", "chosen": colours[n % 4], "rejected": colours[(n + 1) % 4]}
        for n, record in enumerate(records)
    ]
    lines = "".join(json.dumps(record) + "\n" for record in answers)
    (folder / "squares" / "answers.jsonl").write_text(lines)


def start(kind: str, workdir: Path, folder: Path) -> subprocess.Popen:
    arguments = [f"--config={__file__}:{kind}", f"--workdir={workdir}"]
    env = os.environ | {FOLDER: str(folder), "HOME": str(folder), "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    env["XLA_FLAGS"] = FLAGS
    log = workdir.with_suffix(".log").open("a")
    return subprocess.Popen([sys.executable, str(ROOT / "train.py"), *arguments], env=env, stdout=log, stderr=log)


def lines_of(workdir: Path) -> list[str]:
    path = workdir / "metrics.jsonl"
    return path.read_text().splitlines() if path.exists() else []


def step_of(workdir: Path) -> int:
    """The newest step in the log."""
    for line in reversed(lines_of(workdir)):
        try:
            return json.loads(line)["step"]
        except (ValueError, KeyError):
            continue
    return 0


def compare(kind: str, folder: Path, kills: int, rng: random.Random) -> tuple[str, ...]:
    """One row of the table.

    Raises:
      SystemExit: a run failed.
    """
    whole, killed, at = folder / f"{kind}-whole", folder / f"{kind}-killed", []
    _finish(start(kind, whole, folder), whole)
    for _ in range(kills):
        process, stop = start(kind, killed, folder), rng.randint(step_of(killed) + 1, STEPS - 2)
        while process.poll() is None and step_of(killed) < stop:
            time.sleep(0.02)
        time.sleep(rng.uniform(0, 0.3))
        process.send_signal(signal.SIGKILL)
        process.wait()
        at.append(step_of(killed))
    _finish(start(kind, killed, folder), killed)
    ours, theirs = lines_of(killed), lines_of(whole)
    # What an evaluation measured may be written before or after its step's line.
    different = len(set(ours) ^ set(theirs)) + abs(len(ours) - len(theirs))
    return kind, str(len(theirs)), ", ".join(map(str, at)), str(different)


def _finish(process: subprocess.Popen, workdir: Path) -> None:
    if process.wait():
        sys.exit(f"{workdir.name}: {workdir.with_suffix('.log').read_text()[-2000:]}")


def main(argv: Any = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=3, help="of each run (default 3)")
    parser.add_argument("--only", nargs="+", choices=list(KINDS), default=list(KINDS), metavar="KIND")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    print("| run | lines | killed behind steps | lines that differ |\n|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory(prefix="killed-") as name:
        write_all(Path(name))
        for kind in args.only:
            print(f"| {' | '.join(compare(kind, Path(name), args.kills, random.Random(f'{args.seed} {kind}')))} |", flush=True)


if __name__ == "__main__":
    main()
