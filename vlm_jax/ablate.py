"""Tables of ablations that papers published: listed, counted, run, and printed beside the paper's numbers.

    python -m vlm_jax.ablate --base=configs/flamingo_ablations.py
    python -m vlm_jax.ablate --base=configs/flamingo_ablations.py --rows=baseline,every-4th --workdir=runs/ablations

Without `--workdir` the rows are listed with their parameters, beside the paper's columns. With it each row is trained, one
after the other, by `train.py` in a folder of its own; the same command goes on where it stopped. `--seeds=3` trains the
baseline with three seeds, whose spread says which differences mean something.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from typing import Any

from absl import app, flags
from rich.console import Console
from rich.table import Table as RichTable

from vlm_jax.ablations.table import TABLES, Base, Row, Table, parameters


def bases_of(path: str) -> Any:
    """The module of a file in configs/ that has `TABLE`, `base` and `get_config`.

    Raises:
      ValueError: it has none of them.
    """
    sys.path.insert(0, str(Path(path).resolve().parent.parent))
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    if spec is None or not Path(path).is_file():
        raise ValueError(f"--base={path}: there is no such file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    missing = [name for name in ("TABLE", "base", "get_config") if not hasattr(module, name)]
    if missing:
        raise ValueError(f"--base={path}: it has no {missing[0]}; expected a file like configs/flamingo_ablations.py")
    return module


def chosen(table: Table, names: list[str]) -> list[Row]:
    """Rows by name; none: all.

    Raises:
      ValueError: an unknown name.
    """
    known = [row.name for row in table.rows]
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"--rows={unknown[0]}: expected some of {', '.join(known)}")
    return [row for row in table.rows if not names or row.name in names]


def listed(table: Table, rows: list[Row], base: Base) -> RichTable:
    """Every row with its parameters, ours and the paper's, and the paper's scores."""
    shown = RichTable(title=table.paper, title_justify="left")
    for name in ("row", "", "setting", "changed to", "parameters", "trained", "paper's"):
        shown.add_column(name, justify="right" if name in ("parameters", "trained", "paper's") else "left")
    for name in ("step", *table.columns, "overall"):
        shown.add_column(name, justify="right")
    for row in rows:
        numbers = [f"{row.published[name]:g}" for name in ("step", *table.columns, "overall")]
        if row.name in base.left_out:
            ours = [base.left_out[row.name], ""]
        else:
            ours = [f"{count / 1e9:.2f}B" for count in parameters(row.change(base.run, base.kit))]
        shown.add_row(row.name, row.group, row.setting, row.changed, *ours, f"{row.published['parameters']}B", *numbers)
    return shown


def run_rows(rows: list[Row], *, base_file: str, size: str, workdir: Path, seeds: int) -> None:
    """Trains each row whose run has not ended.

    Raises:
      ValueError: a run failed.
    """
    jobs = [(row, seed) for row in rows for seed in range(seeds if row.name == "baseline" else 1)]
    for number, (row, seed) in enumerate(jobs, 1):
        folder = workdir / f"{row.name}-{seed}"
        print(f"{number}/{len(jobs)}  {row.name}, seed {seed}: {folder}", flush=True)
        command = [sys.executable, "train.py", f"--config={base_file}:{row.name},{size}", f"--workdir={folder}"]
        code = subprocess.run([*command, f"--config.seed={seed}"], check=False).returncode
        if code in (130, 143):
            raise KeyboardInterrupt
        if code:
            raise ValueError(f"{row.name}, seed {seed}: train.py ended with {code}; its messages are above and in {folder}")


def main(argv: list[str]) -> int:
    if len(argv) > 1:
        sys.exit(f"vlm_jax.ablate: unknown arguments {argv[1:]}; see --help")
    console = Console(width=None if Console().is_terminal else 200)
    try:
        module = bases_of(BASE.value)
        table, base = TABLES[module.TABLE], module.base(SIZE.value)
        rows = [row for row in chosen(table, ROWS.value) if WORKDIR.value is None or row.name not in base.left_out]
        if WORKDIR.value is None:
            console.print(listed(table, rows, base))
            return 0
        workdir = Path(WORKDIR.value)
        run_rows(rows, base_file=BASE.value, size=SIZE.value, workdir=workdir, seeds=SEEDS.value)
    except ValueError as error:
        print(f"vlm_jax.ablate: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("vlm_jax.ablate: interrupted; run the same command again to go on", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    BASE = flags.DEFINE_string(
        "base", None, "A file in configs/ with the baseline, as configs/flamingo_ablations.py.", required=True
    )
    SIZE = flags.DEFINE_string("size", "3b-published", "Which of its sizes.")
    ROWS = flags.DEFINE_list("rows", [], "Names of rows with commas between them; all otherwise.")
    WORKDIR = flags.DEFINE_string("workdir", None, "A folder for the runs; without it the rows are listed.")
    SEEDS = flags.DEFINE_integer("seeds", 1, "With how many seeds the baseline is trained.", lower_bound=1)
    app.run(main)
