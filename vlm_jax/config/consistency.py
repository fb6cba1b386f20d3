"""Sizes of a configuration that must go together: found when it is read, not when an array does not fit, or does by chance."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

from vlm_jax.config.block import BlockConfig
from vlm_jax.config.connector import PerceiverConfig
from vlm_jax.config.dual_encoder import DualEncoderConfig
from vlm_jax.config.fusion import GatedCrossAttentionConfig
from vlm_jax.config.language import (
    DecoderConfig,
    DynamicNtkScaling,
    Llama3Scaling,
    LongRopeScaling,
    RopeConfig,
    YarnScaling,
)
from vlm_jax.config.model import ModelConfig
from vlm_jax.config.objective import ContrastiveConfig, NextTokenConfig
from vlm_jax.config.run import RunConfig
from vlm_jax.config.vision import VitConfig


def check_consistent(config: Any) -> None:
    """Checks a configuration and all of its parts.

    Raises:
      ValueError: sizes that cannot go together; the message names them as in our configuration.
    """
    for where, part in _parts(config, ""):
        for problem in CHECKS.get(type(part), lambda part: ())(part):
            raise ValueError(f"{where or type(part).__name__}: {problem}")


def _parts(config: Any, where: str) -> Iterator[tuple[str, Any]]:
    """The configuration and every dataclass within, with their paths."""
    yield where, config
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            yield from _parts(value, f"{where}.{field.name}" if where else field.name)


def _block(block: BlockConfig) -> Iterator[str]:
    for name in ("width", "heads", "kv_heads", "head_width", "mlp_width"):
        if not isinstance(size := getattr(block, name), int) or size < 1:
            yield f"{name}={size}: expected a whole number from 1 on; are there more heads than the model is wide?"
    if block.heads % block.kv_heads:
        yield f"heads={block.heads} and kv_heads={block.kv_heads}: expected a multiple of the heads of keys and values"
    if block.experts is not None and block.experts.chosen > block.experts.number:
        yield f"{block.experts.chosen} experts are chosen for a token, and there are {block.experts.number}"


def _decoder(decoder: DecoderConfig) -> Iterator[str]:
    if isinstance(decoder.window, tuple) and len(decoder.window) != decoder.layers:
        yield f"windows for {len(decoder.window)} layers, and there are {decoder.layers}"
    if isinstance(decoder.positions, RopeConfig):
        yield from _rope(decoder.positions, decoder.block.head_width)


def _rope(rope: RopeConfig, head_width: int) -> Iterator[str]:
    width = int(head_width * rope.share)  # Q
    if not rope.base > 1:
        yield f"positions.base={rope.base} (rope_theta): expected a number above 1"
    if not 1 <= width <= head_width or width + width % 2 > head_width:
        yield f"RoPE turns {width} of the {head_width} numbers of a head: expected some of them, in pairs"
    match rope.scaling:
        case DynamicNtkScaling() if width <= 2:
            yield f"dynamic NTK scaling of {width} turned numbers: expected more than 2"
        case Llama3Scaling(low_freq_factor=low, high_freq_factor=high) if not low < high:
            yield f"low_freq_factor={low} and high_freq_factor={high}: expected the second to be greater"
        case YarnScaling(beta_slow=slow, beta_fast=fast) if not slow <= fast:
            yield f"beta_slow={slow} and beta_fast={fast}: expected the second to be greater"
        case LongRopeScaling(short_factors=short, long_factors=long):
            count = (width + 1) // 2
            if {len(short), len(long)} != {count}:
                yield f"{len(short)} short and {len(long)} long factors of LongRoPE: expected {count}, one for each frequency"


def _vit(vit: VitConfig) -> Iterator[str]:
    if vit.patch_size > vit.image_size:
        yield f"patch_size={vit.patch_size} and image_size={vit.image_size}: a patch is larger than the picture"
    if wrong := [layer for layer in vit.feature_layers if not -vit.layers - 1 <= layer <= vit.layers]:
        yield f"features of layer {wrong[0]}, and there are {vit.layers} layers"


def _perceiver(perceiver: PerceiverConfig) -> Iterator[str]:
    if perceiver.kv_heads is not None and perceiver.heads % perceiver.kv_heads:
        yield f"heads={perceiver.heads} and kv_heads={perceiver.kv_heads}: expected a multiple"


def _model(model: ModelConfig) -> Iterator[str]:
    if isinstance(model.fusion, GatedCrossAttentionConfig):
        fusion, layers = model.fusion, model.language.layers
        first = fusion.start + fusion.offset
        if not 0 <= fusion.offset < fusion.every or not 0 <= first < layers:
            yield (
                f"gated cross-attention in every {fusion.every}th layer from layer {first} on, and there are {layers} layers: "
                "expected one at least, or the pictures are never seen"
            )
        block = getattr(model.language, "block", None)
        if fusion.place == "within" and block is not None and (block.parallel_residual or block.post_norm):
            yield "fusion.place='within' needs language layers whose feed-forward follows their attention: set it to 'before'"


def _dual_encoder(encoders: DualEncoderConfig) -> Iterator[str]:
    image, text = encoders.image.width, encoders.text.width
    if encoders.image.pool == "none":
        yield "image.pool='none': two towers need one vector of an image: expected class_token, mean or attention"
    if image != text:
        yield f"embeddings of images have width {image} and those of texts {text}: expected the same"


def _run(run: RunConfig) -> Iterator[str]:
    embeds = not run.model.answers
    if isinstance(run.objective, ContrastiveConfig) and not embeds:
        yield "objective.kind='contrastive' trains two towers: set model.kind='dual_encoder'"
    if isinstance(run.objective, NextTokenConfig) and embeds:
        yield "objective.kind='next_token': this model writes no text: set objective.kind='contrastive'"
    if embeds != (run.data.layout == "pair"):
        yield f"data.layout={run.data.layout!r}: set it to {'pair' if embeds else 'conversation'!r} for this model"
    if embeds and (run.data.images, run.data.frames) != (1, 1):
        yield "data.images and data.frames: a pair has one picture: set both to 1"
    if embeds and run.data.too_long == "drop_turns":
        yield "data.too_long='drop_turns' is for conversations: a pair's caption may be cut (truncate)"
    if embeds and run.data.tokens > (run.model.language.max_positions or run.data.tokens):
        yield f"data.tokens={run.data.tokens}: the text tower has learned {run.model.language.max_positions} positions"


def _contrastive(objective: ContrastiveConfig) -> Iterator[str]:
    if not 0 <= objective.label_smoothing < 1:
        yield f"label_smoothing={objective.label_smoothing}: expected from 0 on and below 1"
    if objective.max_scale is not None and not objective.max_scale > 0:
        yield f"max_scale={objective.max_scale}: expected above 0, or None"


CHECKS: dict[type, Callable[[Any], Iterator[str]]] = {
    BlockConfig: _block,
    DecoderConfig: _decoder,
    VitConfig: _vit,
    PerceiverConfig: _perceiver,
    ModelConfig: _model,
    DualEncoderConfig: _dual_encoder,
    ContrastiveConfig: _contrastive,
    RunConfig: _run,
}
