"""A run's programs, compiled from shapes alone: the update of `train.py`, the prefill and the steps of `infer.py`."""

from __future__ import annotations

import dataclasses
import functools
import math
import time
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from vlm_jax.batch import Batch
from vlm_jax.config import RunConfig
from vlm_jax.config.register import module_of
from vlm_jax.generation import decode
from vlm_jax.generation.buckets import SLOTS, STOP_WIDTH, STOPS, bucket
from vlm_jax.generation.programs import STEPS
from vlm_jax.generation.sampling import Sampling
from vlm_jax.sharding import batch_sharding, boxed_params, place_tree, shardings_of, unboxed
from vlm_jax.training.flops import count_flops
from vlm_jax.training.step import Trainer, update_batches


@dataclasses.dataclass(frozen=True, kw_only=True)
class Planned:
    """A program that was compiled, and what is known of it before it runs.

    Attributes:
      arguments: bytes of a device that it is given and keeps, by kind.
      temporary: bytes of a device beside them while it runs; with what it returns in new memory.
      model_flops: of the mathematics, all devices together.
      tokens: that one run of it reads, or writes.
      seconds: that compiling took.
    """

    name: str
    compiled: Any
    mesh: Mesh
    parameters: int
    trained: int
    arguments: Mapping[str, float]
    temporary: float
    model_flops: int
    tokens: int
    seconds: float

    @property
    def bytes(self) -> float:
        """Of a device."""
        return sum(self.arguments.values()) + self.temporary


def device_bytes(tree: Any, shardings: Any) -> float:
    """Bytes of a device.

    Args:
      shardings: of the tree's leaves, or of all.
    """
    leaves = jax.tree.leaves(tree)
    of = jax.tree.leaves(shardings) if not isinstance(shardings, NamedSharding) else [shardings] * len(leaves)
    sizes = (math.prod(one.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf, one in zip(leaves, of, strict=True))
    return float(sum(sizes))


def training(config: RunConfig, mesh: Mesh) -> Planned:
    """One update of a run: of sets that take turns, of the first.

    Raises:
      ValueError: the rows do not divide into the mesh.
    """
    # Outside `jax.set_mesh`: a mesh of devices that are not there can compile, and not compute.
    trainer = Trainer(config, mesh)
    batch = jax.eval_shape(lambda: update_batches(config))[0]
    state, shardings = trainer.abstract_state, trainer.shardings
    with jax.set_mesh(mesh):
        began = time.perf_counter()
        compiled = trainer.train_step.lower(state, batch).compile()
        seconds = time.perf_counter() - began
        count = functools.partial(trainer.gradients_of_sets, reference=state.reference, recompute=False)
        flops = count_flops(count, state.trained, state.frozen, batch)
    parts = ("trained", "frozen", "opt_state", "reference")
    names = ("trained parameters", "frozen parameters", "optimizer", "reference")
    arguments = {
        name: device_bytes(getattr(state, part), getattr(shardings, part)) for name, part in zip(names, parts, strict=True)
    }
    arguments["batch"] = device_bytes(batch, trainer.batch_sharding)
    parameters, trained = trainer.blueprint.counts
    return Planned(
        name="update",
        compiled=compiled,
        mesh=mesh,
        parameters=parameters,
        trained=trained,
        arguments={name: size for name, size in arguments.items() if size},
        temporary=_temporary(compiled),
        model_flops=flops,
        tokens=sum(one.tokens.size for one in jax.tree.leaves(batch, is_leaf=lambda x: isinstance(x, Batch))),
        seconds=seconds,
    )


def _temporary(compiled: Any) -> float:
    memory = compiled.memory_analysis()
    return float(memory.temp_size_in_bytes + max(0, memory.output_size_in_bytes - memory.alias_size_in_bytes))


def generation(
    config: RunConfig, mesh: Mesh, *, rows: int, tokens: int, images: int, new: int, dtype: str = "bfloat16"
) -> tuple[Planned, Planned]:
    """The prefill of prompts, and up to 32 further tokens of each.

    Args:
      rows: prompts at once; tokens: of each, its visual tokens included; images: of each, of one frame.
      new: tokens that there is room for.
      dtype: of parameters and computation.

    Returns:
      the prefill, and the steps, whose figures are of one token a row.
    """
    model = module_of(config.model)(config.model, jnp.dtype(dtype), "none")
    boxed = boxed_params(model)
    of = lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, jnp.dtype(dtype), sharding=sharding)
    params = jax.tree.map(of, unboxed(boxed), shardings_of(place_tree(boxed, mesh), mesh))
    by_row, everywhere = batch_sharding(mesh), NamedSharding(mesh, PartitionSpec())
    placed = lambda tree, sharding: jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(np.shape(x), jnp.result_type(x), sharding=sharding), tree
    )
    prompts = placed(_prompts(config, rows, tokens, images), by_row)
    vocabulary = config.model.language.vocab_size
    constraints = decode.Constraints(allowed=np.ones(vocabulary, bool), ends=np.zeros(1, np.int32), pad=np.int32(0))
    constraints, settings = placed(constraints, everywhere), placed(_row_settings(rows), by_row)
    prefill = functools.partial(decode.prefill, model)
    with jax.set_mesh(mesh):
        began = time.perf_counter()
        read = jax.jit(prefill).lower(params, prompts).compile()
        read_seconds = time.perf_counter() - began
        prefilled = _with(jax.eval_shape(prefill, params, prompts), read.output_shardings)
        begin = functools.partial(decode.begin, slots=bucket(tokens + new, SLOTS))
        begun = jax.jit(begin).lower(prefilled, settings, constraints).compile()
        state = _with(jax.eval_shape(begin, prefilled, settings, constraints)[0], begun.output_shardings[0])
        steps = functools.partial(decode.steps, model, room=STEPS)
        began = time.perf_counter()
        most = jax.ShapeDtypeStruct((), jnp.int32, sharding=everywhere)
        go_on = jax.jit(steps, donate_argnums=1).lower(params, state, constraints, most).compile()
        seconds = time.perf_counter() - began
        one = lambda params, state, constraints: decode.step(model, params, state, constraints)
        flops = count_flops(prefill, params, prompts), count_flops(one, params, state, constraints)
    held = {"parameters": device_bytes(params, jax.tree.map(lambda leaf: leaf.sharding, params))}
    cached = jax.tree.map(lambda leaf: leaf.sharding, state)
    shared = dict(mesh=mesh, parameters=sum(leaf.size for leaf in jax.tree.leaves(params)), trained=0)
    return (
        Planned(
            name="prefill",
            compiled=read,
            arguments=held | {"prompts": device_bytes(prompts, by_row)},
            temporary=_temporary(read),
            model_flops=flops[0],
            tokens=rows * tokens,
            seconds=read_seconds,
            **shared,
        ),
        Planned(
            name="decode",
            compiled=go_on,
            arguments=held | {"cache": device_bytes(state, cached)},
            temporary=_temporary(go_on),
            model_flops=flops[1],
            tokens=rows,
            seconds=seconds,
            **shared,
        ),
    )


def _with(tree: Any, shardings: Any) -> Any:
    return jax.tree.map(lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree, shardings)


def _prompts(config: RunConfig, rows: int, tokens: int, images: int) -> Batch:
    names = ("tokens", "positions", "segments", "media_last", "media_first", "prefix_end")
    arrays: dict[str, Any] = {name: np.zeros((rows, tokens), np.int32) for name in names}
    if images and config.model.has_vision:
        side = config.model.vision.image_size
        arrays["images"] = np.zeros((rows, images, 1, side, side, 3), np.uint8)
        arrays["frames"] = np.zeros((rows, images), np.int32)
        if config.model.visual_tokens_in_sequence:
            arrays["visual"] = np.zeros((rows, tokens), np.int32)
    return Batch(**arrays)


def _row_settings(rows: int) -> decode.RowSettings:
    fill = lambda dtype: np.zeros(rows, dtype)
    sampling = Sampling(
        temperature=fill(np.float32),
        top_k=fill(np.int32),
        top_p=fill(np.float32),
        repetition_penalty=fill(np.float32),
        seeds=fill(np.uint32),
    )
    stops = np.zeros((rows, bucket(1, STOPS), bucket(1, STOP_WIDTH)), np.int32)
    return decode.RowSettings(sampling=sampling, limits=fill(np.int32), stops=stops)
