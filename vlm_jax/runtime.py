"""JAX's settings, made before it looks for devices, and the dtype of the computation."""

from __future__ import annotations

import os
from typing import Any

import jax
import jax.numpy as jnp

CACHE = "~/.cache/vlm_jax/compiled"


def prepare(cache: str | None = None) -> None:
    """A persistent compilation cache, so that a second start compiles nothing, and `synchronous_cpu`.

    Args:
      cache: where compiled programs are kept; None: $JAX_COMPILATION_CACHE_DIR, or `CACHE`.
    """
    folder = cache or os.environ.get("JAX_COMPILATION_CACHE_DIR") or CACHE
    jax.config.update("jax_compilation_cache_dir", os.path.expanduser(folder))
    # The default keeps only programs that took a second to compile; a start runs dozens of smaller ones.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    synchronous_cpu()


def synchronous_cpu() -> None:
    """On a CPU a program runs in its caller; otherwise it occupies one of the threads that its matrix products share."""
    jax.config.update("jax_cpu_enable_async_dispatch", False)


def uncached_among_cpus() -> None:
    """After the distributed start: no compilation cache where the processes of a run compute on CPUs.

    JAX keeps the first process's programs alone. At the second start it loads its own and the others compile theirs, and the
    collectives of the two come in different orders: Gloo aborts, or mixes what has the same size.
    """
    if jax.process_count() > 1 and jax.default_backend() == "cpu":
        jax.config.update("jax_enable_compilation_cache", False)


def compute_dtype(name: str) -> Any:
    """`RunConfig.dtype` -> a dtype: bfloat16 by itself on GPU and TPU; on CPU it is emulated and slow."""
    if name == "auto":
        name = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    return jnp.dtype(name)
