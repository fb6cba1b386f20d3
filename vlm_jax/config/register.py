"""Registers: what a name, or the class of a configuration, stands for, in this package or in another one.

Another package registers its values by the same calls, in a module that it names by an entry point::

    [project.entry-points."vlm_jax.plugins"]
    my_parts = "my_package.parts"  # importing it registers what is in it
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import pkgutil
from collections.abc import Callable, Hashable, Iterator
from typing import Any, Generic, TypeVar

PLUGINS = "vlm_jax.plugins"

Value = TypeVar("Value")


class RegisterError(ValueError):
    """A name that nothing is registered under, or two things under one name."""


class Register(Generic[Value]):
    """Values by name, read from `packages` and the plugins when the first name is looked up."""

    def __init__(self, what: str, *packages: str) -> None:
        """
        Args:
          what: noun for error messages.
          packages: those whose modules are all imported, so that they can register their values.
        """
        self.what, self._packages = what, packages
        self._known: dict[Hashable, Value] = {}

    def add(self, *names: Hashable) -> Callable[[Value], Value]:
        """A decorator, or a call: `register.add("a", "b")(value)`.

        Raises:
          RegisterError: another value has the name.
        """

        def added(value: Value) -> Value:
            for name in names:
                if self._known.setdefault(name, value) is not value:
                    raise RegisterError(f"{self.what} {_said(name)} is registered twice: {self._known[name]} and {value}")
            return value

        return added

    def __getitem__(self, name: Hashable) -> Value:
        """
        Raises:
          RegisterError: an unknown name; the message lists those that are known.
        """
        if name not in self:
            known = ", ".join(sorted(map(_said, self)))
            raise RegisterError(f"{self.what} {_said(name)} is not known: expected one of {known}")
        return self._known[name]

    def __contains__(self, name: Hashable) -> bool:
        self._read()
        return name in self._known

    def __iter__(self) -> Iterator[Any]:
        self._read()
        return iter(tuple(self._known))

    def _read(self) -> None:
        for package in self._packages:
            _import_modules(package)
        load_plugins()


def _said(name: Hashable) -> str:
    return name.__name__ if isinstance(name, type) else repr(name)


@functools.cache
def _import_modules(package: str) -> None:
    for module in pkgutil.iter_modules(importlib.import_module(package).__path__):
        importlib.import_module(f"{package}.{module.name}")


@functools.cache
def load_plugins() -> None:
    """Imports what other packages registered by entry points.

    Raises:
      RegisterError: one cannot be imported.
    """
    for entry in importlib.metadata.entry_points(group=PLUGINS):
        try:
            entry.load()
        except Exception as error:  # whatever the import of another package raises
            raise RegisterError(f"the plugin {entry.name} ({entry.value}) cannot be imported: {error!r}") from error


# By the class of the configuration; constructed from it and arguments given by `models/`.
MODULES: Register[type] = Register("a module for the configuration", "vlm_jax.layers", "vlm_jax.models")


def module_of(config: Any) -> type:
    """The module that a configuration stands for.

    Raises:
      RegisterError: there is none.
    """
    return MODULES[type(config)]
