"""Open vision-language models in JAX and Flax."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vlm_jax.api import Encoder, Vlm, export, load

__all__ = ["Encoder", "Vlm", "export", "load"]


def __getattr__(name: str) -> Any:
    """They come when they are asked for, so that `import vlm_jax` takes no time."""
    if name in __all__:
        from vlm_jax import api

        return getattr(api, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
