"""The weights of a DINOv2 (Oquab et al. 2023) that PyTorch exported to ONNX from transformers' `Dinov2Model`.

The exporter keeps the names of tensors that it does not change, and numbers those that it folds: matrices, which it transposes
and which are named here after the node that multiplies by them, and positions. Anything after the backbone is ignored.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np

from vlm_jax.config import ImageTowerConfig
from vlm_jax.families import dinov2
from vlm_jax.interop.checkpoint import Checkpoint
from vlm_jax.interop.files.source import Arrays, PublishedError
from vlm_jax.interop.register import FILES
from vlm_jax.processing.encoder_processor import EncoderProcessor

HEAD_WIDTH = 64  # of every published size; the graph says it in the shapes of its activations alone
EPS = 1e-6
CLASS_TOKEN = "embeddings.cls_token"


@FILES.add(".onnx")
def open_onnx(path: Path) -> Checkpoint:
    """
    Raises:
      PublishedError: no such file, or not one of such a backbone.
    """
    state = read_weights(path)
    hf_config = _config(state, path)
    config = ImageTowerConfig(encoder=dinov2.config_from_hf(hf_config), pool="class_token")
    processor = EncoderProcessor(_pictures())

    def keep_files(folder: Path) -> None:
        hf_config.save_pretrained(folder)
        processor.hf_processor.save_pretrained(folder)

    return Checkpoint(
        path=path,
        config=config,
        processor=processor,
        tables=(dinov2.table(config.encoder).under(ours="encoder/"),),
        open_source=lambda: Arrays(state),
        keep_files=keep_files,
    )


def read_weights(path: Path) -> dict[str, np.ndarray]:
    """Tensors by their names in hub files.

    Raises:
      PublishedError: see `open_onnx`.
    """
    try:
        import onnx
        from google.protobuf.message import DecodeError
    except ImportError as error:
        raise PublishedError(f"{path}: the onnx package reads ONNX files: pip install 'vlm_jax[onnx]'") from error
    if not path.is_file():
        raise PublishedError(f"{path}: there is no such file")
    try:
        graph = onnx.load(str(path)).graph
    except (DecodeError, onnx.checker.ValidationError, ValueError, OSError) as error:
        raise PublishedError(f"{path}: no ONNX file, or a damaged one: {error}") from error
    found = {tensor.name: tensor for tensor in graph.initializer}
    array = lambda name: onnx.numpy_helper.to_array(found[name])
    owner = next((name.removesuffix(CLASS_TOKEN) for name in found if name.endswith(CLASS_TOKEN)), None)
    if owner is None:
        raise PublishedError(f"{path}: it holds no {CLASS_TOKEN}, so it is not a DINOv2 with transformers' names")
    state = {name.removeprefix(owner): array(name) for name in found if name.startswith(owner)}
    positions = {}
    for node in graph.node:
        place = ".".join([*node.name.strip("/").split("/")[:-1], ""])
        if not place.startswith(owner):
            continue
        for name in (name for name in node.input if name in found and not name.startswith(owner)):
            if node.op_type == "MatMul":
                state[f"{place.removeprefix(owner)}weight"] = array(name).T
            elif place == f"{owner}embeddings." and len(found[name].dims) == 3:
                positions[node.op_type] = array(name)
    # The class token's is put in front of the others, which are made a square that can be resized.
    if positions.keys() != {"Concat", "Reshape"}:
        raise PublishedError(f"{path}: its position embeddings were not found")
    state["embeddings.position_embeddings"] = np.concatenate([positions["Concat"], positions["Reshape"]], axis=1)
    return state


def _config(state: dict[str, np.ndarray], path: Path) -> Any:
    """`Dinov2Config` by the shapes."""
    from transformers import Dinov2Config

    needed = ("embeddings.patch_embeddings.projection.weight", "encoder.layer.0.mlp.fc1.weight")
    missing = [name for name in needed if name not in state]
    if missing:
        raise PublishedError(f"{path}: it holds no {missing[0]}, so it is not a published DINOv2 with a two-layer MLP")
    width, _, _, patch = state[needed[0]].shape
    if width % HEAD_WIDTH:
        raise PublishedError(f"{path}: width {width} does not divide into heads of {HEAD_WIDTH}")
    layers = {match[1] for name in state if (match := re.match(r"encoder\.layer\.(\d+)\.", name))}
    return Dinov2Config(
        hidden_size=width,
        num_hidden_layers=len(layers),
        num_attention_heads=width // HEAD_WIDTH,
        mlp_ratio=state["encoder.layer.0.mlp.fc1.weight"].shape[0] // width,
        image_size=int((state["embeddings.position_embeddings"].shape[1] - 1) ** 0.5) * patch,
        patch_size=patch,
        layer_norm_eps=EPS,
        use_mask_token=False,
    )


def _pictures() -> Any:
    """The image processor of facebook/dinov2-*."""
    from transformers import BitImageProcessorPil

    return BitImageProcessorPil(
        size={"shortest_edge": 256},
        crop_size={"height": 224, "width": 224},
        resample=3,  # bicubic
        image_mean=dinov2.MEAN,
        image_std=dinov2.STD,
    )
