"""Adapters of a run: what `RunConfig.adapters` adds to the parameters, how they begin, and their dropout."""

from __future__ import annotations

import math
import re
import zlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from vlm_jax.config import LoraConfig, ParamRule
from vlm_jax.layers.lora import NAME, PATH, boxes_of, with_adapters
from vlm_jax.paths import Params, by_path, nested
from vlm_jax.sharding import Named

Array = jax.Array


def adapter_boxes(boxes: Mapping[str, Named], adapters: tuple[LoraConfig, ...]) -> dict[str, Named]:
    """Shapes and axis names of the adapters, by path.

    Args:
      boxes: those of the model's parameters.

    Raises:
      ValueError: an entry that no linear map's path matches, or a value that it cannot have.
    """
    maps = {path.removesuffix("/kernel"): box for path, box in boxes.items() if isinstance(box, Named) and box.inputs}
    found: dict[str, Named] = {}
    for number, entry in enumerate(adapters):
        _check(entry, f"config.adapters[{number}]")
        matched = [path for path in maps if re.search(entry.pattern, path)]
        if not matched:
            raise ValueError(
                f"config.adapters[{number}]: no linear map's path matches {entry.pattern!r}; there are "
                f"{', '.join(list(maps)[:40])}"
            )
        for path in matched:
            if f"{path}/lora/{entry.name}/a" not in found:
                found |= boxes_of(f"{path}/lora/{entry.name}", maps[path], entry.rank)
    return found


def _check(entry: LoraConfig, where: str) -> None:
    if not NAME.fullmatch(entry.name):
        raise ValueError(f"{where}: name {entry.name!r}: expected letters, digits, '_', '-' and '.'")
    if entry.rank < 1 or not 0 <= entry.dropout < 1:
        raise ValueError(f"{where}: rank={entry.rank}, dropout={entry.dropout}: expected a rank of 1 or more, a share below 1")


def entry_of(path: str, adapters: tuple[LoraConfig, ...]) -> LoraConfig:
    """The entry that an adapter's parameter was made by."""
    found = PATH.fullmatch(path)
    return next(one for one in adapters if one.name == found["name"] and re.search(one.pattern, found["module"]))


def initial_adapters(boxes: Mapping[str, Named], adapters: tuple[LoraConfig, ...], key: Array) -> Params:
    """Adapters as PEFT begins them: A uniform to 1 / sqrt(inputs), B zero, so that the model is what it was.

    Args:
      boxes: of `adapter_boxes`.
    """

    def of(path: str, box: Named) -> Array:
        entry, shape = entry_of(path, adapters), box.value.shape
        if path.endswith("/scale"):
            return jnp.full(shape, entry.alpha / (math.sqrt(entry.rank) if entry.rank_stabilised else entry.rank))
        if path.endswith("/b"):
            return jnp.zeros(shape)
        lead = int(box.names[0] == "layers")
        bound = math.prod(shape[lead:-1]) ** -0.5
        return jax.random.uniform(_folded(key, path), shape, minval=-bound, maxval=bound)

    return nested({path: of(path, box) for path, box in boxes.items()})


def with_dropout(params: Params, adapters: tuple[LoraConfig, ...], key: Array) -> Params:
    """The parameters with what `ops.low_rank` reads for dropout beside those adapters that have some.

    Args:
      key: of a run and its step (and micro-batch): a step that is done again leaves out the same.
    """
    added: dict[str, Any] = {}
    for path, scale in by_path(params).items():
        found = PATH.fullmatch(path)
        if not found or found["leaf"] != "scale" or not (rate := entry_of(path, adapters).dropout):
            continue
        beside, own = path.removesuffix("/scale"), _folded(key, path)
        added[f"{beside}/dropout/key"] = jax.random.split(own, scale.shape[0]) if scale.ndim else own
        added[f"{beside}/dropout/rate"] = jnp.full(scale.shape, rate, jnp.float32)
    return with_adapters(params, nested(added)) if added else params


def _folded(key: Array, path: str) -> Array:
    return jax.random.fold_in(key, zlib.crc32(path.encode()))


def check_rules(rules: Mapping[str, ParamRule]) -> None:
    """
    Raises:
      ValueError: an adapter all of which is frozen.
    """
    fates: dict[str, list[ParamRule]] = {}
    for path, rule in rules.items():
        if (found := PATH.fullmatch(path)) and found["leaf"] != "scale":
            fates.setdefault(found["name"], []).append(rule)
    for name, of_name in fates.items():
        if all(rule.frozen for rule in of_name):
            raise ValueError(
                f"config.adapters: {name!r} is frozen by the rule {of_name[0].pattern!r}: put ParamRule(pattern='/lora/') "
                "before it in config.optimizer.rules"
            )
