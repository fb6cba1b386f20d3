"""Reads adapters in PEFT's format; `peft.py` describes it."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from vlm_jax.errors import RequestError
from vlm_jax.interop.files.safetensors_files import SafetensorsFiles
from vlm_jax.interop.files.settings import read_settings
from vlm_jax.interop.files.source import PublishedError, Source
from vlm_jax.interop.files.torch_pickle import TorchPickles
from vlm_jax.interop.peft import (
    CONFIG,
    HALVES,
    OTHERS,
    PICKLE,
    WEIGHTS,
    LinearMap,
    base_name,
    map_of,
    memory_name,
    our_shape,
    row_of,
)
from vlm_jax.interop.table import Row, Shape, Table, axes_of, published_name
from vlm_jax.layers.lora import NAME, PATH, boxes_of, cast
from vlm_jax.paths import Params, by_path, nested
from vlm_jax.sharding import boxed_params, place

READ = {"peft_type", "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "fan_in_fan_out", "bias"}
# Settings of training, or of what the file's own names say.
IDLE = {
    "auto_mapping",
    "base_model_name_or_path",
    "eva_config",
    "exclude_modules",
    "inference_mode",
    "layers_pattern",
    "layers_to_transform",
    "loftq_config",
    "lora_dropout",
    "megatron_core",
    "modules_to_save",
    "peft_version",
    "qalora_group_size",
    "revision",
    "target_modules",
    "task_type",
    "runtime_config",
}
PLAIN_STARTS = (True, False, "gaussian", "eva", "orthogonal", "loftq", None)  # others change the base model's weights


def read_adapter(
    folder: str | Path, name: str, tables: Sequence[Table], boxes: Mapping[str, Any], *, pickles: bool = False
) -> Params:
    """An adapter -> what is put over the parameters (`layers.lora.with_adapters`), NumPy arrays.

    A layer that has none gets zeros. Of layers of several ranks all get the largest, filled with zeros.

    Args:
      tables: published names, those that fit most are used; boxes: shapes and axis names of the model's parameters, by path.
      pickles: whether `.bin` files may be read; nothing in them is executed.

    Raises:
      PublishedError: no adapter, a damaged one, one of another model, or of a kind that is not supported.
    """
    folder = Path(folder).expanduser()
    settings = _settings(folder)
    source = _source(folder, pickles)
    table = max(tables, key=lambda table: sum(row_of(table, base_name(one)) is not None for one in source.tensors))
    found: dict[tuple[str, ...], dict[tuple[Shape, str], np.ndarray]] = defaultdict(dict)
    maps: dict[tuple[str, ...], LinearMap] = {}
    replaced: dict[str, dict[Shape, np.ndarray]] = defaultdict(dict)
    unknown, scales = [], {}
    for key, tensor in source.tensors.items():
        hit = row_of(table, base_name(key))
        if hit is None or any(path not in boxes for path in hit[0].ours):
            unknown.append(key)
            continue
        one, numbers = hit
        values = source.read(key, tuple(slice(0, size) for size in tensor.shape)).astype(np.float32)
        if not np.isfinite(values).all():
            raise PublishedError(f"{folder}: {key} holds values that are not finite: the file is damaged")
        half = next((half for end, half in HALVES.items() if key.endswith(end)), None)
        if half is None:
            for path, part in _replaced(one, boxes, values, f"{folder}: {key}").items():
                replaced[path][numbers] = part
            continue
        if one.published not in maps:
            maps[one.published] = map_of(one, boxes, str(folder))
        if any(number >= count for number, count in zip(numbers, maps[one.published].counts, strict=True)):
            raise PublishedError(
                f"{folder}: {key}: the model has {maps[one.published].counts[0]} layers; it is another model's"
            )
        found[one.published][numbers, half] = values
        scales[one.published, numbers] = _scale(settings, base_name(key).removesuffix(".weight"), values.shape[half == "b"])
    if unknown:
        raise PublishedError(
            f"{folder} has {len(unknown)} tensors that this model has no linear map for, {unknown[0]} among them: is it an "
            "adapter of another model?"
        )
    leaves: dict[str, Any] = {}
    for published, halves in found.items():
        leaves |= _stacked(folder, name, maps[published], halves, {n: s for (p, n), s in scales.items() if p == published})
    for path, parts in replaced.items():
        leaves[path] = _all_layers(folder, path, parts, boxes[path])
    return nested(leaves)


def load_adapters(
    model: nn.Module,
    tables: Callable[[Mapping[str, Any]], Sequence[Table]],
    folders: Mapping[str, str | Path],
    *,
    known: Sequence[str],
    mesh: Mesh,
    pickles: bool,
) -> dict[str, Any]:
    """Adapters by name: what `read_adapter` gives, on the mesh as the model's parameters are.

    Args:
      tables: boxes -> the names that an adapter may come under; folders: by name.
      known: names that are taken.

    Raises:
      RequestError: a name that cannot be; PublishedError: as `read_adapter`.
    """
    if not folders:
        return {}
    boxes, made = by_path(boxed_params(model)), {}
    names = tables(boxes)
    for name, folder in folders.items():
        if not NAME.fullmatch(name) or name in known:
            raise RequestError(f"adapters: name {name!r}: expected letters, digits, '_', '-' and '.', and not {list(known)}")
        leaves = by_path(read_adapter(folder, name, names, boxes, pickles=pickles))
        of = dict(boxes)
        for path, leaf in leaves.items():
            if (found := PATH.fullmatch(path)) and found["leaf"] == "a":
                of |= boxes_of(path.removesuffix("/a"), boxes[f"{found['module']}/kernel"], leaf.shape[-1])
        of_leaf = lambda path, of=of: NamedSharding(mesh, place(of[path].names, of[path].value.shape, mesh).spec)
        made[name] = cast(nested({path: jax.device_put(leaf, of_leaf(path)) for path, leaf in leaves.items()}), model.dtype)
    return made


def _settings(folder: Path) -> Mapping[str, Any]:
    path = folder / CONFIG
    if not path.is_file():
        raise PublishedError(f"no adapter at {folder}: it has no {CONFIG}")
    settings = read_settings(path)
    if settings.get("peft_type") != "LORA":
        raise PublishedError(f"{path}: peft_type={settings.get('peft_type')!r}: only LORA is implemented")
    if settings.get("init_lora_weights", True) not in PLAIN_STARTS:
        raise PublishedError(
            f"{path}: init_lora_weights={settings['init_lora_weights']!r} changed the base model's weights too: let PEFT "
            "convert it to a plain LoRA (`save_pretrained(path_initial_model_for_weight_conversion=...)`)"
        )
    if settings.get("bias", "none") != "none" or settings.get("fan_in_fan_out"):
        raise PublishedError(
            f"{path}: bias={settings.get('bias')!r}, fan_in_fan_out={settings.get('fan_in_fan_out')}: not implemented"
        )
    known = READ | IDLE | {"init_lora_weights"}
    if wrong := {name: value for name, value in settings.items() if name not in known and value}:
        raise PublishedError(f"{path}: {', '.join(f'{name}={value!r:.60}' for name, value in wrong.items())}: not implemented")
    rank, alpha = settings.get("r"), settings.get("lora_alpha")
    if type(rank) is not int or rank < 1 or isinstance(alpha, bool) or not isinstance(alpha, int | float):
        raise PublishedError(f"{path}: r={rank!r}, lora_alpha={alpha!r}: expected a whole number and a number")
    return settings


def _source(folder: Path, pickles: bool) -> Source:
    weights = folder / WEIGHTS
    if not weights.exists() and (folder / PICKLE).exists() and not pickles:
        raise PublishedError(f"{folder} holds {PICKLE} and no {WEIGHTS}: it is read with pickles=True (--pickles)")
    source: Source = TorchPickles([folder / PICKLE]) if not weights.exists() and pickles else SafetensorsFiles([weights])
    if (folder / OTHERS).exists():
        if not pickles:
            raise PublishedError(f"{folder} holds {OTHERS}, trained parameters: it is read with pickles=True (--pickles)")
        source = _Both(source, TorchPickles([folder / OTHERS]))
    return source


class _Both:
    """The tensors of two sources."""

    def __init__(self, *sources: Source) -> None:
        self._of = {name: source for source in sources for name in source.tensors}
        self.tensors = {name: source.tensors[name] for name, source in self._of.items()}

    def read(self, name: str, index: Any) -> np.ndarray:
        return self._of[name].read(name, index)


def _scale(settings: Mapping[str, Any], module: str, rank: int) -> float:
    patterns = settings.get("alpha_pattern") or {}
    found = next((key for key in patterns if re.match(rf"(.*\.)?({key})$", module)), None)
    alpha = settings["lora_alpha"] if found is None else patterns[found]
    return float(alpha / (rank**0.5 if settings.get("use_rslora") else rank))


def _stacked(
    folder: Path, name: str, one: LinearMap, found: Mapping[tuple[Shape, str], np.ndarray], scales: Mapping[Shape, float]
) -> dict[str, np.ndarray]:
    """The adapters of one linear map in all layers."""
    layers = {numbers for numbers, _ in found}
    ranks = {}
    for numbers in layers:
        a, b = (found.get((numbers, half)) for half in ("a", "b"))
        module = published_name(memory_name(one.row.published[0]), numbers).removesuffix(".weight")
        if a is None or b is None:
            raise PublishedError(f"{folder}: {module} has one of lora_A and lora_B alone: the file is damaged")
        ranks[numbers] = a.shape[0]
        wanted = tuple(one.of_rank(half, a.shape[0]).shape for half in ("a", "b"))
        if (a.shape, b.shape) != wanted:
            raise PublishedError(
                f"{folder}: {module}: found shapes {a.shape} and {b.shape}, expected {wanted}: another model's?"
            )
    most = max(ranks.values())
    leaves = {}
    for which, module in enumerate(one.modules):
        made = {}
        for half in ("a", "b"):
            axes = one.of_rank(half, most)
            out = made[half] = np.zeros((*one.counts, *our_shape(axes)), np.float32)
            for numbers in layers:
                own = one.of_rank(half, ranks[numbers])
                whole = tuple(slice(0, size) for size in our_shape(own))
                part = own.take(lambda index, n=numbers, h=half: found[n, h][index], whole, which)
                out[(*numbers, *whole)] = part
        made["scale"] = np.zeros(one.counts, np.float32)
        for numbers in layers:
            made["scale"][numbers] = scales[numbers]
        leaves |= {f"{module}/lora/{name}/{leaf}": values for leaf, values in made.items()}
    return leaves


def _replaced(one: Row, boxes: Mapping[str, Any], values: np.ndarray, where: str) -> dict[str, np.ndarray]:
    """A whole published tensor -> ours, of one layer."""
    shape = lambda path: getattr(boxes[path], "value", boxes[path]).shape[one.counted :]
    axes = axes_of(one, shape(one.ours[0]))
    if len(one.published) > 1 or values.shape != axes.shape:
        raise PublishedError(f"{where}: found {values.shape}, expected {axes.shape}: another model's?")
    whole = lambda path: tuple(slice(0, size) for size in shape(path))
    return {path: axes.take(lambda index: values[index], whole(path), place) for place, path in enumerate(one.ours)}


def _all_layers(folder: Path, path: str, parts: Mapping[Shape, np.ndarray], box: Any) -> np.ndarray:
    out = np.empty(getattr(box, "value", box).shape, np.float32)
    counted = len(next(iter(parts)))
    if len(parts) != math.prod(out.shape[:counted]):
        raise PublishedError(f"{folder}: {path} is in it of some layers only: not implemented")
    for numbers, values in parts.items():
        out[numbers] = values
    return out
