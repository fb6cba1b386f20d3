"""The base of every configuration: a frozen dataclass with keyword-only fields."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

from vlm_jax.config.register import Register

frozen = dataclasses.dataclass(frozen=True, kw_only=True)


class Kinds:
    """The base of a choice between several kinds of configuration, distinguished by a field `kind`.

    A direct subclass is the choice ("a connector"); every subclass of that with a `kind` is registered as one of its kinds::

        @frozen
        class PixelShuffleConfig(ConnectorConfig):
            kind: Literal["pixel_shuffle"] = "pixel_shuffle"

    Attributes:
      default_kind: what a written configuration without a `kind` is; "": it must have one.
    """

    kinds: ClassVar[Register[type]]
    default_kind: ClassVar[str] = ""

    def __init_subclass__(cls, **rest: Any) -> None:
        super().__init_subclass__(**rest)
        if Kinds in cls.__bases__:
            cls.kinds = Register(f"a {cls.__name__} of kind")
        elif "kind" in cls.__dict__:
            cls.kinds.add(cls.kind)(cls)
