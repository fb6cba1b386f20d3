"""Settings of a published folder, as JSON: one reader, and one way to check their values before anything is made of them.

`bounds.py` says which values a setting may have.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from vlm_jax.errors import abbreviated
from vlm_jax.files import JsonError, parse_json, read_regular
from vlm_jax.interop.files.source import PublishedError


@dataclasses.dataclass(frozen=True)
class Rule:
    """
    Attributes:
      expected: in words, for an error.
    """

    expected: str
    good: Callable[[Any], bool]

    def __or__(self, other: Rule) -> Rule:
        return Rule(f"{self.expected} or {other.expected}", lambda value: self.good(value) or other.good(value))


def whole(low: int, high: int) -> Rule:
    """A whole number within bounds; a truth value is none."""
    return Rule(f"a whole number from {low:,} to {high:,}", lambda value: type(value) is int and low <= value <= high)


def number(low: float, high: float) -> Rule:
    """A number above `low` and at most `high`."""
    return Rule(f"a number above {low:g} and at most {high:g}", lambda value: _is_number(value) and low < value <= high)


def number_from(low: float, high: float) -> Rule:
    """A number within bounds."""
    return Rule(f"a number from {low:g} to {high:g}", lambda value: _is_number(value) and low <= value <= high)


def listed(rule: Rule, least: int, most: int) -> Rule:
    """A list of so many values."""
    count = f"{least}" if least == most else f"{least} to {most:,}"
    good = lambda value: isinstance(value, list) and least <= len(value) <= most and all(map(rule.good, value))
    return Rule(f"a list of {count} times {rule.expected}", good)


def one_of(*values: Any) -> Rule:
    return Rule(f"one of {', '.join(map(json.dumps, values))}", lambda value: type(value) is str and value in values)


FLAG = Rule("true or false", lambda value: isinstance(value, bool))
NULL = Rule("null", lambda value: value is None)
TEXT = Rule("a text", lambda value: isinstance(value, str))
WORD = Rule("a text that is not empty", lambda value: isinstance(value, str) and bool(value))
OBJECT = Rule("an object", lambda value: isinstance(value, dict))


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


Bounds = Mapping[str, "Rule | Bounds"]  # by the name of the setting; bounds of bounds are of an object, which may be null


def read_settings(path: Path) -> dict[str, Any]:
    """A file that holds one JSON object.

    Raises:
      PublishedError: it cannot be read, is no JSON, or holds what is no text or no number: half of a surrogate pair, NaN.
    """
    try:
        settings = parse_json(read_regular(path))
        for value in _values(settings):
            if isinstance(value, float) and not math.isfinite(value):
                raise JsonError(f"has the number {value}")
            if isinstance(value, str):
                value.encode()
    except OSError as error:
        raise PublishedError(f"{path}: {error.strerror or error}; fetch it again") from error
    except JsonError as error:
        raise PublishedError(f"{path} is damaged: it {error}; fetch it again") from error
    except UnicodeEncodeError:
        raise PublishedError(f"{path} is damaged: it has half of a surrogate pair, no character; fetch it again") from None
    if not isinstance(settings, dict):
        raise PublishedError(f"{path} is damaged: it holds {abbreviated(json.dumps(settings))}, no object; fetch it again")
    return settings


def _values(found: Any) -> Iterator[Any]:
    """Everything within a JSON value, the keys too."""
    rest = [found]
    while rest:
        value = rest.pop()
        yield value
        if isinstance(value, dict):
            rest += value.keys()
            rest += value.values()
        elif isinstance(value, list):
            rest += value


def check_settings(path: Path, settings: Mapping[str, Any], bounds: Bounds) -> None:
    """
    Args:
      path: named in errors.
      bounds: of settings that are used; others may be anything. They also hold in the objects within whose name ends with
        "_config", those of the parts of a model.

    Raises:
      PublishedError: a setting that is used has a value that it cannot have.
    """
    wrong = [f"{name}={_shown(value)} (expected {expected})" for name, value, expected in _wrong(settings, bounds)]
    if wrong:
        more = f", and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise PublishedError(f"{path}: {'; '.join(wrong[:3])}{more}: correct it, or fetch the file again")


def _wrong(settings: Mapping[str, Any], bounds: Bounds) -> Iterator[tuple[str, Any, str]]:
    rest = [("", settings, bounds)]
    while rest:
        prefix, values, here = rest.pop()
        for key, value in values.items():
            rule = here.get(key)
            if isinstance(rule, Rule):
                if not rule.good(value):
                    yield prefix + key, value, rule.expected
                rule = None
            inner = here if rule is None and key.endswith(("_config", "_config_dict")) else rule
            if rule is not None and not (value is None or (isinstance(value, dict) and value.keys() & rule.keys())):
                yield prefix + key, value, f"an object with some of {', '.join(list(rule)[:3])} ..., or null"
            elif inner is not None and isinstance(value, dict):
                rest.append((f"{prefix}{key}.", value, inner))


def _shown(value: Any) -> str:
    try:
        return abbreviated(json.dumps(value, ensure_ascii=False))
    except RecursionError:
        return f"{type(value).__name__} nested too deeply"
