"""Parameters by path: the names of the nested dicts joined by "/", as in `language/layers/attention/query/kernel`."""

from __future__ import annotations

from typing import Any

from flax.traverse_util import flatten_dict, unflatten_dict

Params = Any


def by_path(params: Params) -> dict[str, Any]:
    """Nested dicts -> {path: leaf}."""
    return flatten_dict(params, sep="/")


def nested(flat: dict[str, Any]) -> Params:
    """{path: leaf} -> nested dicts."""
    return unflatten_dict(flat, sep="/")
