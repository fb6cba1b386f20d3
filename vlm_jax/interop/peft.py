"""Adapters alone, in the format of Hugging Face's PEFT: `adapter_config.json` and `adapter_model.safetensors`.

    base_model.model.model.language_model.layers.0.self_attn.q_proj.lora_A.weight   [rank, inputs]
    base_model.model.model.language_model.layers.0.self_attn.q_proj.lora_B.weight   [outputs, rank]
    base_model.model.model.multi_modal_projector.linear_1.weight                    of `modules_to_save`: in the base's place

Names are those of the published family, by its table, as its modules are called in memory. A model without a published family
has names of its own, `own_table`. LLaVA's `non_lora_trainables.bin` has further names of the last kind.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
import string
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vlm_jax.interop.engine import published_tensors
from vlm_jax.interop.files.folder import new_folder
from vlm_jax.interop.files.safetensors_files import SafetensorsFiles
from vlm_jax.interop.files.settings import read_settings
from vlm_jax.interop.files.source import PublishedError, Source
from vlm_jax.interop.files.torch_pickle import TorchPickles
from vlm_jax.interop.table import Axes, Row, Shape, Table, axes_of, pattern, published_name, row
from vlm_jax.layers.lora import PATH
from vlm_jax.paths import Params, by_path, nested
from vlm_jax.sharding import Named

CONFIG, WEIGHTS, PICKLE, OTHERS = (
    "adapter_config.json",
    "adapter_model.safetensors",
    "adapter_model.bin",
    "non_lora_trainables.bin",
)
PREFIX = "base_model.model."
HALVES = {".lora_A.weight": "a", ".lora_B.weight": "b"}
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


@dataclasses.dataclass(frozen=True)
class _Map:
    """A linear map of the published model: one of ours, or several that it has fused."""

    row: Row
    modules: tuple[str, ...]  # our paths
    halves: Mapping[str, Axes]  # of A and B for a rank of 1, published <-> ours
    counts: Shape

    def of_rank(self, half: str, rank: int) -> Axes:
        return dataclasses.replace(self.halves[half], sizes=self.halves[half].sizes | {self.letter: rank})

    @property
    def letter(self) -> str:
        return _free_letter(self.row)


def own_table(boxes: Mapping[str, Any]) -> Table:
    """Our own names in the published form: `language/layers/mlp/up/kernel` is `language.layers.{}.mlp.up.weight`, its inputs last."""
    rows = []
    for path, box in boxes.items():
        names = box.names if isinstance(box, Named) else (None,) * box.ndim
        stacked = bool(names) and names[0] == "layers"
        letters = string.ascii_uppercase.replace("J", "")[: len(names) - stacked]
        inputs = getattr(box, "inputs", 0)
        published = path.replace("/layers/", "/layers/{}/", 1) if stacked else path
        if inputs:
            published = f"{published.removesuffix('/kernel')}/weight"
            sides = [letters[inputs:], letters[:inputs]]
        else:
            sides = list(letters)
        axes = " ".join(f"({' '.join(side)})" if len(side) > 1 else side for side in sides)
        rows.append(row(published.replace("/", "."), path, f"{axes} -> {' '.join(letters)}"))
    return Table(tuple(rows))


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
    table = max(tables, key=lambda table: sum(_row_of(table, _weight(one)) is not None for one in source.tensors))
    found: dict[tuple[str, ...], dict[tuple[Shape, str], np.ndarray]] = defaultdict(dict)
    maps: dict[tuple[str, ...], _Map] = {}
    replaced: dict[str, dict[Shape, np.ndarray]] = defaultdict(dict)
    unknown, scales = [], {}
    for key, tensor in source.tensors.items():
        hit = _row_of(table, _weight(key))
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
            maps[one.published] = _map_of(one, boxes, str(folder))
        if any(number >= count for number, count in zip(numbers, maps[one.published].counts, strict=True)):
            raise PublishedError(
                f"{folder}: {key}: the model has {maps[one.published].counts[0]} layers; it is another model's"
            )
        found[one.published][numbers, half] = values
        scales[one.published, numbers] = _scale(settings, _weight(key).removesuffix(".weight"), values.shape[half == "b"])
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


def _settings(folder: Path) -> Mapping[str, Any]:
    path = folder / CONFIG
    if not path.is_file():
        raise PublishedError(f"no adapter at {folder}: it has no {CONFIG}")
    settings = read_settings(path)
    if settings.get("peft_type") != "LORA":
        raise PublishedError(f"{path}: peft_type={settings.get('peft_type')!r}: only LORA is implemented")
    if settings.get("init_lora_weights", True) not in PLAIN_STARTS:
        raise PublishedError(
            f"{path}: init_lora_weights={settings['init_lora_weights']!r} changed the base model's weights too: let PEFT convert "
            "it to a plain LoRA (`save_pretrained(path_initial_model_for_weight_conversion=...)`)"
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


def _weight(key: str) -> str:
    """A name in an adapter's file -> that of the base model's tensor."""
    name = key.removeprefix(PREFIX)
    for end in HALVES:
        name = f"{name.removesuffix(end)}.weight" if name.endswith(end) else name
    return name


def _row_of(table: Table, name: str) -> tuple[Row, Shape] | None:
    for one in table.rows:
        for template in one.published:
            if match := pattern(template).fullmatch(name):
                return one, tuple(map(int, match.groups()))
    return None


def _scale(settings: Mapping[str, Any], module: str, rank: int) -> float:
    patterns = settings.get("alpha_pattern") or {}
    found = next((key for key in patterns if re.match(rf"(.*\.)?({key})$", module)), None)
    alpha = settings["lora_alpha"] if found is None else patterns[found]
    return float(alpha / (rank**0.5 if settings.get("use_rslora") else rank))


def _free_letter(one: Row) -> str:
    return next(letter for letter in reversed(string.ascii_uppercase) if letter not in one.axes and letter != "J")


def _map_of(one: Row, boxes: Mapping[str, Any], where: str) -> _Map:
    """
    Raises:
      PublishedError: not a linear map, or one whose published inputs do not stand last.
    """
    of_row = [boxes[path] for path in one.ours]
    inputs = getattr(of_row[0], "inputs", 0)
    if not inputs or len(one.published) > 1:
        raise PublishedError(f"{where}: {one.published[0]} is no linear map of the model: adapters of it are not implemented")
    shape = of_row[0].value.shape
    axes = axes_of(one, shape[one.counted :])
    ours_in, ours_out = axes.ours[:inputs], axes.ours[inputs:]
    letters = lambda groups: sorted(letter for group in groups for letter in group if letter != "J")
    if len(axes.published) != 2 or letters(axes.published[1:]) != letters(ours_in):
        raise PublishedError(f"{where}: {one.published[0]}: its inputs do not stand last: adapters of it are not implemented")
    rank = [_free_letter(one)]
    sizes = axes.sizes | {rank[0]: 1}
    halves = {
        "a": Axes([rank, axes.published[1]], [*ours_in, rank], _only(sizes, [rank, *ours_in])),
        "b": Axes([axes.published[0], rank], [rank, *ours_out], _only(sizes, [rank, axes.published[0]])),
    }
    return _Map(one, tuple(path.removesuffix("/kernel") for path in one.ours), halves, shape[: one.counted])


def _only(sizes: Mapping[str, int], groups: Sequence[Sequence[str]]) -> dict[str, int]:
    return {letter: sizes[letter] for group in groups for letter in group}


def _stacked(
    folder: Path, name: str, one: _Map, found: Mapping[tuple[Shape, str], np.ndarray], scales: Mapping[Shape, float]
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
    for place, module in enumerate(one.modules):
        made = {}
        for half in ("a", "b"):
            axes = one.of_rank(half, most)
            out = made[half] = np.zeros((*one.counts, *_our_shape(axes)), np.float32)
            for numbers in layers:
                own = one.of_rank(half, ranks[numbers])
                whole = tuple(slice(0, size) for size in _our_shape(own))
                part = own.take(lambda index, n=numbers, h=half: found[n, h][index], whole, place)
                out[(*numbers, *whole)] = part
        made["scale"] = np.zeros(one.counts, np.float32)
        for numbers in layers:
            made["scale"][numbers] = scales[numbers]
        leaves |= {f"{module}/lora/{name}/{leaf}": values for leaf, values in made.items()}
    return leaves


def _our_shape(axes: Axes) -> Shape:
    return tuple(math.prod(axes.sizes[letter] for letter in group) for group in axes.ours)


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


def memory_name(template: str) -> str:
    """A published name of a row as transformers names the module in memory: of its spellings `model.` and the file's first part.

    Parts of a larger model are written under their own prefix and held under `model.`.
    """

    def chosen(match: re.Match[str]) -> str:
        spellings = match[0][1:-1].split("|")
        if len(spellings) == 1:
            return ""
        inside = [name for name in spellings if name.startswith(f"model.{spellings[0].split('.')[0]}")]
        return min(inside or spellings, key=len)

    return re.sub(r"\[.*?\]", chosen, template)


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
    from safetensors.numpy import save_file

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
                f"{module} is a part of {one.published[0]}, one linear map of the published model, and has an adapter of its own: "
                "PEFT's format cannot hold that. Export the merged model (without adapter=)"
            )
        of_map, template = _map_of(one, boxes, module), memory_name(one.published[0])
        targets.append(re.escape(template.removesuffix(".weight")).replace(r"\{\}", r"\d+"))
        for numbers in np.ndindex(of_map.counts):
            rank = own["a"].shape[-1]
            base_name = published_name(template, numbers).removesuffix(".weight")
            for end, half in HALVES.items():
                tensors[f"{PREFIX}{base_name}{end}"] = np.ascontiguousarray(
                    of_map.of_rank(half, rank).joined([own[half][numbers]])
                )
            sizes[base_name] = (rank, _number(float(own["scale"][numbers]) * rank))
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
                f"{', '.join(one.ours)} was trained too, and PEFT's format holds only whole modules without an adapter: export the "
                "merged model (without adapter=)"
            )
    renamed = (dataclasses.replace(one, published=tuple(map(memory_name, one.published))) for one in chosen)
    params = nested({path: np.asarray(flat[path], np.float32) for path in also})
    return dict(published_tensors(params, Table(tuple(renamed)))) if also else {}
