"""Configurations as dataclasses, as plain dicts, and as the `ConfigDict` that the command line overrides."""

from __future__ import annotations

import ast
import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import dacite
import ml_collections

from vlm_jax.config.consistency import check_consistent
from vlm_jax.config.frozen import Kinds
from vlm_jax.config.register import RegisterError
from vlm_jax.errors import RequestError


def to_dict(config: Any) -> Any:
    """Nested dataclasses -> nested plain dicts (tuples kept)."""
    return dataclasses.asdict(config)


def to_config_dict(config: Any) -> ml_collections.ConfigDict:
    """Nested dataclasses -> a locked `ConfigDict`, whose leaves the command line can override."""
    return ml_collections.ConfigDict(to_named_dict(config), convert_dict=True).lock()


def to_named_dict(value: Any) -> Any:
    """As `to_dict`, but with a dict in the place of a tuple of named parts (`by_name`), each under its name."""
    if dataclasses.is_dataclass(value):
        return {field.name: to_named_dict(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, tuple):
        named = value and all(getattr(item, "by_name", False) for item in value)
        if named and len({item.name for item in value}) == len(value):
            return {item.name: to_named_dict(item) for item in value}
        return tuple(map(to_named_dict, value))
    return value


def _as_tuples(values: Any) -> Any:
    """The inverse of `to_named_dict`."""
    if isinstance(values, Mapping):
        inner = {key: _as_tuples(value) for key, value in values.items()}
        named = inner and all(isinstance(item, Mapping) and item.get("name") == key for key, item in inner.items())
        return tuple(inner.values()) if named else inner
    return tuple(map(_as_tuples, values)) if isinstance(values, tuple | list) else values


def from_dict(cls: type, values: Any) -> Any:
    """The inverse of `to_dict`.

    Raises:
      ValueError: an unknown, missing or mistyped field, or sizes that cannot go together; the message names it.
    """
    try:
        config = _read(cls, values)
    except dacite.DaciteError as error:
        raise ValueError(f"config: {error}") from error
    _refuse_missing(config, values, "")
    try:
        check_consistent(config)
    except ValueError as error:
        raise ValueError(f"config: {error}") from error
    return config


def _read(cls: type, values: Any) -> Any:
    hooks = {choice: functools.partial(_of_kind, choice) for choice in Kinds.__subclasses__()}
    options = dacite.Config(strict=True, strict_unions_match=True, cast=[tuple], type_hooks={float: _as_float} | hooks)
    return dacite.from_dict(cls, values, options)


def _of_kind(choice: type[Kinds], values: Any) -> Any:
    """One of the registered kinds of a choice, by its `kind`."""
    if not isinstance(values, Mapping):
        return values
    kind = values.get("kind", choice.default_kind)
    if not kind:
        raise dacite.MissingValueError("kind")
    try:
        config = choice.kinds[kind]
    except RegisterError as error:
        raise _UnknownKind(error) from error
    return _read(config, values)


class _UnknownKind(dacite.DaciteFieldError):
    """dacite puts the names of the fields around it in front."""

    def __init__(self, error: RegisterError) -> None:
        super().__init__(field_path="kind")
        self.error = error

    def __str__(self) -> str:
        return f"{self.field_path}: {self.error}"


def _as_float(value: Any) -> Any:
    # A whole number is a float too, as JSON and the command line write it; a truth value is not, though Python says so.
    if isinstance(value, bool):
        raise dacite.WrongTypeError(field_type=float, value=value)
    return float(value) if isinstance(value, int) else value


def _refuse_missing(config: Any, values: Any, path: str) -> None:
    """dacite takes a missing field that may be None for None."""
    for field in dataclasses.fields(config):
        name, part = f"{path}{field.name}", getattr(config, field.name)
        if field.name in values:
            nested = values[field.name]
        elif field.default is dataclasses.MISSING:
            raise ValueError(f'config: missing value for field "{name}"')
        else:
            continue
        if dataclasses.is_dataclass(part):
            _refuse_missing(part, nested, f"{name}.")
        elif isinstance(part, tuple):
            for index, (item, item_values) in enumerate(zip(part, nested, strict=True)):
                if dataclasses.is_dataclass(item):
                    _refuse_missing(item, item_values, f"{name}[{index}].")


def from_config_dict(cls: type, values: ml_collections.ConfigDict) -> Any:
    """The inverse of `to_config_dict`."""
    return from_dict(cls, _as_tuples(values.to_dict()))


def kind_of(text: str, known: Mapping[str, Mapping[str, Any]] | None = None) -> dict[str, Any]:
    """A part of a configuration as a command line names it: "ranking:captions=20" -> {"kind": "ranking", "captions": 20}.

    Args:
      known: settings that a name stands for.

    Raises:
      RequestError: something behind the colon that is not SETTING=VALUE.
    """
    kind, _, rest = text.partition(":")
    settings = dict((known or {}).get(kind, {"kind": kind}))
    for part in filter(None, rest.split(",")):
        name, equals, value = part.partition("=")
        if not equals:
            raise RequestError(f"{text!r}: {part!r}: expected SETTING=VALUE")
        try:
            settings[name.strip()] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            settings[name.strip()] = value
    return settings
