"""Writes adapters in PEFT's format; `peft.py` describes it."""

from __future__ import annotations

import dataclasses
import json
import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from vlm_jax.interop.engine import published_tensors
from vlm_jax.interop.files.folder import new_folder
from vlm_jax.interop.files.source import PublishedError
from vlm_jax.interop.peft import CONFIG, HALVES, PREFIX, WEIGHTS, map_of, memory_name
from vlm_jax.interop.table import Table, published_name
from vlm_jax.layers.lora import PATH
from vlm_jax.paths import Params, by_path, nested


def write_adapter(
    folder: str | Path,
    name: str,
    params: Params,
    table: Table,
    boxes: Mapping[str, Any],
    *,
    also: Sequence[str] = (),
    dropout: float = 0.0,
    base: str | None = None,
) -> int:
    """Writes one adapter of `params`; returns the bytes of its numbers.

    Args:
      table: names to write; boxes: as in `read_adapter`.
      also: paths of whole parameters that were trained with it: PEFT's `modules_to_save`.
      dropout: that it was trained with; base: the base model's name.

    Raises:
      PublishedError: the folder is not empty, there is no such adapter, or PEFT's format cannot hold it.
    """
    flat = by_path(params)
    adapters: dict[str, dict[str, np.ndarray]] = defaultdict(dict)
    for path, leaf in flat.items():
        if (found := PATH.fullmatch(path)) and found["name"] == name:
            adapters[found["module"]][found["leaf"]] = np.asarray(leaf, np.float32)
    if not adapters:
        raise PublishedError(f"there is no adapter {name!r}")
    rows = {path: one for one in table.rows for path in one.ours}
    tensors: dict[str, np.ndarray] = {}
    sizes: dict[str, tuple[int, float]] = {}
    targets = []
    for module, own in adapters.items():
        one = rows[f"{module}/kernel"]
        if len(one.ours) > 1:
            raise PublishedError(
                f"{module} is a part of {one.published[0]}, one linear map of the published model, and has an adapter of its "
                "own: PEFT's format cannot hold that. Export the merged model (without adapter=)"
            )
        of_map, template = map_of(one, boxes, module), memory_name(one.published[0])
        targets.append(re.escape(template.removesuffix(".weight")).replace(r"\{\}", r"\d+"))
        for numbers in np.ndindex(of_map.counts):
            rank = own["a"].shape[-1]
            module_name = published_name(template, numbers).removesuffix(".weight")
            for end, half in HALVES.items():
                tensors[f"{PREFIX}{module_name}{end}"] = np.ascontiguousarray(
                    of_map.of_rank(half, rank).joined([own[half][numbers]])
                )
            sizes[module_name] = (rank, _number(float(own["scale"][numbers]) * rank))
    whole = _whole(flat, also, table, adapters)
    tensors |= {f"{PREFIX}{key}": values for key, values in whole.items()}
    target = new_folder(folder)
    save_file(tensors, target / WEIGHTS, metadata={"format": "pt"})
    (rank, alpha), _ = Counter(sizes.values()).most_common(1)[0]
    settings = {
        "peft_type": "LORA",
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": dropout,
        "target_modules": "|".join(targets),
        "modules_to_save": sorted({key.rpartition(".")[0] for key in whole}) or None,
        "rank_pattern": {re.escape(key): size[0] for key, size in sizes.items() if size[0] != rank},
        "alpha_pattern": {re.escape(key): size[1] for key, size in sizes.items() if size[1] != alpha},
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "use_dora": False,
        "init_lora_weights": True,
        "inference_mode": True,
        "task_type": None,
    }
    (target / CONFIG).write_text(json.dumps(settings, indent=2) + "\n")
    return sum(tensor.nbytes for tensor in tensors.values())


def _number(value: float) -> float:
    return int(value) if value == int(value) else value


def _whole(flat: Mapping[str, Any], also: Sequence[str], table: Table, adapters: Mapping[str, Any]) -> dict[str, np.ndarray]:
    chosen = [one for one in table.rows if set(one.ours) & set(also)]
    for one in chosen:
        part, alone = (
            one.ours[0].rpartition("/")[0] in adapters,
            "." not in memory_name(one.published[0]).removeprefix("model."),
        )
        if part or alone or not set(one.ours) <= set(also):
            raise PublishedError(
                f"{', '.join(one.ours)} was trained too, and PEFT's format holds only whole modules without an adapter: export "
                "the merged model (without adapter=)"
            )
    renamed = (dataclasses.replace(one, published=tuple(map(memory_name, one.published))) for one in chosen)
    params = nested({path: np.asarray(flat[path], np.float32) for path in also})
    return dict(published_tensors(params, Table(tuple(renamed)))) if also else {}
