"""Random kills, damages and nonsense, with a seed: what came of each.

    python benchmarks/soak.py --minutes=20
    python benchmarks/soak.py --minutes=5 --only damage folder --seed=3

Kinds of attack:

    kill      train.py is killed at random moments until it is through; its metrics.jsonl must equal an undisturbed run's
    damage    bytes of a run's folder are changed, or a file cut short, and the run is asked
    export    the same of a folder that `vlm_jax.export` wrote
    folder    a setting of a published folder's JSON files is replaced, or a whole file (tests/interop/mutations.py)
    picture   bytes of a picture are changed; it is measured, decoded and cut
    line      a line of training data is changed, and tokenised
    question  a line of a file of questions is changed, and laid out
    request   an argument of `generate`, `chat` or `answer` is replaced

What counts: "right" (the answer of before, 32 tokens; the lines of before), "read" (nothing is to be compared: a start that was
killed, a picture that is another one), "refused" (an error of this library, which says why), "named" (another answer, after a
warning), "silent" (another answer without a word), "raw" (an error from elsewhere: a traceback), "hang" (nothing after a
minute). The last three are printed with what was attacked.
"""

from __future__ import annotations

import argparse
import collections
import logging
import os
import random
import signal
import tempfile
import time
import traceback
import warnings
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from attacks import ATTACKS, NOTHING, ROOT, Attack, Ground, Refused

from vlm_jax import runtime

PATIENCE_S = 60
OUTCOMES = ("right", "read", "refused", "named", "silent", "raw", "hang")
SHARES = {"kill": 0.5}  # of the time; the others share the rest
LOGGED: list[str] = []  # since the attack began


class Hang(BaseException):
    pass


class Logged(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        if record.levelno >= logging.WARNING:
            LOGGED.append(record.getMessage())


def outcome(attack: Attack) -> str:
    LOGGED.clear()
    signal.alarm(PATIENCE_S)
    try:
        answer = attack.run()
    except Refused:
        return "refused"
    except Hang:
        print(f"hang: {attack.what}", flush=True)
        return "hang"
    except Exception as error:
        if isinstance(error, ValueError | OSError) and _is_ours(error):
            return "refused"
        print(f"raw: {attack.what}\n{traceback.format_exc()}", flush=True)
        return "raw"
    finally:
        signal.alarm(0)
    if answer is NOTHING:
        return "read"
    if answer == attack.expected:
        return "right"
    if LOGGED:
        return "named"
    print(f"silent: {attack.what}: {answer!r:.300}", flush=True)
    return "silent"


def _is_ours(error: Exception) -> bool:
    """Raised by this library on purpose, in a line."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    return str(ROOT / "vlm_jax") in last.filename and len(str(error).splitlines()) == 1


def expired(*_: Any) -> None:
    raise Hang


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", choices=list(ATTACKS), metavar="KIND", help="some kinds of attack")
    args = parser.parse_args()
    signal.signal(signal.SIGALRM, expired)
    logging.getLogger().addHandler(Logged())
    warnings.simplefilter("ignore")  # Pillow's, of odd tags
    with tempfile.TemporaryDirectory(prefix="soak-") as name:
        os.environ["HOME"] = name  # the caches of compiled programs and of tokens
        runtime.prepare()
        ground, chosen = Ground(Path(name)), args.only or list(ATTACKS)
        rest = (1 - sum(SHARES.get(kind, 0) for kind in chosen)) / max(sum(kind not in SHARES for kind in chosen), 1)
        print(f"| attack | number | {' | '.join(OUTCOMES)} |\n|---|---|{'---|' * len(OUTCOMES)}", flush=True)
        for kind in chosen:
            until, rng = time.monotonic() + 60 * args.minutes * SHARES.get(kind, rest), random.Random(f"{args.seed} {kind}")
            counts: collections.Counter[str] = collections.Counter()
            while time.monotonic() < until:
                counts[outcome(ATTACKS[kind](ground, rng))] += 1
            print(f"| {kind} | {counts.total()} | {' | '.join(str(counts[name]) for name in OUTCOMES)} |", flush=True)


if __name__ == "__main__":
    main()
