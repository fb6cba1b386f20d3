"""JAX's persistent compilation cache, so that a second start compiles nothing."""

from __future__ import annotations

import os

import jax

DEFAULT = "~/.cache/vlm_jax/compiled"


def enable(folder: str | None = None) -> str:
    """Keeps every compiled program in `folder` (or $JAX_COMPILATION_CACHE_DIR, or `DEFAULT`). Returns the folder."""
    folder = os.path.expanduser(folder or os.environ.get("JAX_COMPILATION_CACHE_DIR") or DEFAULT)
    jax.config.update("jax_compilation_cache_dir", folder)
    # The default keeps only programs that took a second to compile; a start runs dozens of smaller ones.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    return folder
