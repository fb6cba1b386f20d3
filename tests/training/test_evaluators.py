"""Evaluators: when they run, what is written of them, and which checkpoint they rank best."""

import dataclasses
import json
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image

from tests.tiny import text_run, write_data
from vlm_jax.config import EvaluatorConfig, JsonLinesConfig, RunConfig
from vlm_jax.config.frozen import frozen
from vlm_jax.config_dict import from_dict, to_dict
from vlm_jax.training.evaluator import EVALUATORS, Evaluation, RunParts
from vlm_jax.training.loop import train


@frozen
class NormsConfig(EvaluatorConfig):
    kind: Literal["test_norms"] = "test_norms"
    sign: int = 1


@EVALUATORS.add(NormsConfig)
class Norms:
    """Looks at a parameter; a picture and a text are shown."""

    metrics = ("embedding",)

    def __init__(self, config: NormsConfig, parts: RunParts) -> None:
        self.config = config
        assert len(parts.held_out) == 24

    def evaluate(self, state) -> Evaluation:
        norm = self.config.sign * float(np.linalg.norm(state.params["language"]["embedding"]))
        picture = np.full((8, 4, 3), int(state.step), np.uint8)
        return Evaluation(metrics={"embedding": norm}, pictures={"": picture}, texts={"words": "**a**"})


def run_of(folder: Path, *evaluators: EvaluatorConfig, **changes) -> RunConfig:
    config = text_run(evaluators=evaluators, **changes)
    data = write_data(folder / "data", pictures=False)
    source = JsonLinesConfig(train=str(data), eval=str(data))
    return dataclasses.replace(config, data=dataclasses.replace(config.data, source=source, cache_dir=str(folder / "cache")))


def lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_each_runs_at_its_own_cadence_and_at_the_end(tmp_path, capfd, runs_on_one_device):
    evaluators = (NormsConfig(every=4), NormsConfig(every=5, name="other", sign=-1), NormsConfig(name="last"))
    config = run_of(tmp_path, *evaluators, best_by="-other_embedding", save_every=5, keep_last=1, steps=12)
    result = train(from_dict(RunConfig, json.loads(json.dumps(to_dict(config)))), tmp_path / "run")
    seen = lambda name: [line["step"] for line in lines(tmp_path / "run") if f"eval_{name}_embedding" in line]
    assert seen("test_norms") == [4, 8, 12] and seen("other") == [5, 10, 12] and seen("last") == [12]
    assert result.metrics["last_embedding"] == -result.metrics["other_embedding"] and "accuracy" in result.metrics
    sheet = tmp_path / "run" / "test_norms" / "step-000008.png"
    assert np.asarray(Image.open(sheet)).tolist() == np.full((8, 4, 3), 8).tolist()
    output = capfd.readouterr().out
    assert "step 12: last: embedding " in output and ", in 0:00" in output
