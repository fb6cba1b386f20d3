"""Where a run is watched from: TensorBoard, and Weights & Biases for those who ask for it."""

from __future__ import annotations

import html
import json
import secrets
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from tensorboardX import SummaryWriter

from vlm_jax.config import RunConfig
from vlm_jax.config_dict import to_dict
from vlm_jax.files import JsonError, parse_json, read_regular

Pictures = dict[str, np.ndarray]  # [height, width, 3] uint8 by name


class Board(Protocol):
    def plot(self, step: int, metrics: dict[str, float]) -> None: ...

    def show(self, step: int, *, pictures: Pictures, texts: dict[str, str]) -> None:
        """
        Args:
          texts: Markdown by name.
        """
        ...

    def flush(self) -> None: ...

    def close(self) -> None: ...


class TensorBoard:
    """RUN/tensorboard; what an earlier start wrote of later steps is not shown."""

    def __init__(self, folder: Path, first_step: int) -> None:
        self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=first_step)

    def plot(self, step: int, metrics: dict[str, float]) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)

    def show(self, step: int, *, pictures: Pictures, texts: dict[str, str]) -> None:
        for name, picture in pictures.items():
            self._writer.add_image(name, picture, step, dataformats="HWC")
        for name, text in texts.items():
            self._writer.add_text(name, text, step)

    def flush(self) -> None:
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class WandbBoard:
    """Weights & Biases (`config.wandb` names the project). With WANDB_MODE=offline all stays in RUN/wandb, for `wandb sync`.

    A resumed run goes on under the same id, which RUN/wandb/run.json keeps with the newest step that was handed over. Steps up
    to it are not sent again: a resumed run repeats them bit for bit. What belongs to a step is sent together, when a later one
    comes.
    """

    def __init__(self, folder: Path, config: RunConfig) -> None:
        """
        Raises:
          ValueError: the package is not installed.
        """
        try:
            import wandb
        except ImportError:
            raise ValueError(
                f"config.wandb={config.wandb!r}: Weights & Biases is not installed: pip install 'vlm_jax[wandb]', or leave "
                "config.wandb empty"
            ) from None
        self._wandb, self._path = wandb, folder / "wandb" / "run.json"
        self._path.parent.mkdir(exist_ok=True)
        self._id, self._newest = self._known()
        self._write()
        settings = wandb.Settings(silent=True, console="off")
        self._run = wandb.init(
            project=config.wandb,
            id=self._id,
            name=folder.resolve().name,
            dir=str(folder),
            config=to_dict(config),
            resume="allow",
            settings=settings,
        )
        self._step, self._waiting = self._newest, {}

    def _known(self) -> tuple[str, int]:
        try:
            found = parse_json(read_regular(self._path))
            return found["id"], found["step"]
        except (FileNotFoundError, JsonError, KeyError, TypeError):
            return secrets.token_hex(4), -1

    def _write(self) -> None:
        part = self._path.with_suffix(".part")
        part.write_text(json.dumps({"id": self._id, "step": self._newest}) + "\n")
        part.replace(self._path)

    def plot(self, step: int, metrics: dict[str, float]) -> None:
        self._add(step, metrics)

    def show(self, step: int, *, pictures: Pictures, texts: dict[str, str]) -> None:
        shown: dict[str, Any] = {name: self._wandb.Image(picture) for name, picture in pictures.items()}
        as_text = lambda text: self._wandb.Html(f"<pre>{html.escape(text)}</pre>")
        self._add(step, shown | {f"{name}/text": as_text(text) for name, text in texts.items()})

    def _add(self, step: int, values: dict[str, Any]) -> None:
        if step <= self._newest:
            return
        if step != self._step:
            self._send()
            self._step = step
        self._waiting |= values

    def _send(self) -> None:
        if self._waiting:
            # Written first: a step may be missing there after a kill, and never stands there twice.
            self._newest = self._step
            self._write()
            self._run.log(self._waiting, step=self._step)
            self._waiting = {}

    def flush(self) -> None:
        """What belongs to the newest step may not be complete."""

    def close(self) -> None:
        self._send()
        self._run.finish()
