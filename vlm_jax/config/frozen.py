"""What every configuration is: a frozen dataclass whose fields are named where it is made."""

from __future__ import annotations

import dataclasses

frozen = dataclasses.dataclass(frozen=True, kw_only=True)
