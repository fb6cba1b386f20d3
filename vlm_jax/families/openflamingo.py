"""OpenFlamingo's names and settings (Awadalla et al. 2023; layer names of its `open_flamingo/src/helpers.py`).

Its file holds what was trained: the resampler, the gated layers and the embeddings, and a head that is tied to these. CLIP and
the language model keep their own names; `VISION_PART` and `LANGUAGE_PART` in front of them let one table hold all three.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection
from typing import Any

from vlm_jax.config import GatedCrossAttentionConfig, ModelConfig, PerceiverConfig
from vlm_jax.families import clip
from vlm_jax.interop.register import LANGUAGE
from vlm_jax.interop.rows import norm
from vlm_jax.interop.table import Copy, Table, row

VISION_PART, LANGUAGE_PART = "vision:", "language:"
SAVED = "lang_encoder."  # what of the language model is in the checkpoint
LATENTS, DEPTH, HEADS, HEAD_WIDTH = 64, 6, 8, 64  # of all released models
GATED = "gated.{}."


def config_from_parts(
    vision: Any, language: Any, *, every: int, vocabulary: int, latents: int = LATENTS, depth: int = DEPTH
) -> ModelConfig:
    """transformers' configurations of the parts -> ours.

    Args:
      vocabulary: of the language model with the tokens that were added.
    """
    decoder = LANGUAGE[language.model_type].config_from_hf(language)
    tower = clip.vision_from_hf(vision)
    return ModelConfig(
        # The patch tokens before the norm: open_clip gave them so when the models were trained.
        vision=dataclasses.replace(tower, post_norm="held", class_token="dropped"),
        connector=PerceiverConfig(latents=latents, layers=depth, heads=HEADS, head_width=HEAD_WIDTH, activation="gelu"),
        fusion=GatedCrossAttentionConfig(
            every=every,
            offset=every - 1,
            heads=HEADS,
            head_width=HEAD_WIDTH,
            mlp_width=4 * decoder.block.width,
            activation="gelu",
        ),
        language=dataclasses.replace(decoder, vocab_size=vocabulary),
    )


def table(config: ModelConfig, language: Any, saved: Collection[str]) -> Table:
    """Names of the joined parts <-> the paths of a `VisionLanguageModel`.

    Args:
      saved: the names in the checkpoint.
    """
    return (
        clip.vision_table(config.vision).under(f"{VISION_PART}[vision_model.]", "vision/")
        + _perceiver()
        + _gated()
        + _language(config, language, saved)
    )


def _attention(published: str, ours: str) -> tuple[Any, ...]:
    return (
        row(f"{published}to_q.weight", f"{ours}/query/kernel", "(N H) D -> D N H"),
        row(f"{published}to_kv.weight", (f"{ours}/key/kernel", f"{ours}/value/kernel"), "(J N H) D -> D N H"),
        row(f"{published}to_out.weight", f"{ours}/out/kernel", "D (N H) -> N H D"),
    )


def _feed_forward(published: str, ours: str) -> tuple[Any, ...]:
    return (
        *norm(f"{published}0", f"{ours}/mlp_norm"),
        row(f"{published}1.weight", f"{ours}/mlp/up/kernel", "F D -> D F"),
        row(f"{published}3.weight", f"{ours}/mlp/down/kernel", "D F -> F D"),
    )


def _perceiver() -> Table:
    layer, ours = "perceiver.layers.{}.", "connector/layers"
    rows = (
        row("perceiver.latents", "connector/latents", "R D -> R D"),
        *norm(f"{layer}0.norm_media", f"{ours}/feature_norm"),
        *norm(f"{layer}0.norm_latents", f"{ours}/latent_norm"),
        *_attention(f"{layer}0.", f"{ours}/attention"),
        *_feed_forward(f"{layer}1.", ours),
        *norm("perceiver.norm", "connector/norm"),
    )
    return Table(rows)


def _gated() -> Table:
    ours = "fusion/layers"
    rows = (
        *norm(f"{GATED}attn.norm", f"{ours}/attention_norm"),
        *_attention(f"{GATED}attn.", f"{ours}/attention"),
        *_feed_forward(f"{GATED}ff.", ours),
        row(f"{GATED}attn_gate", f"{ours}/attention_gate", "() ->"),
        row(f"{GATED}ff_gate", f"{ours}/mlp_gate", "() ->"),
    )
    return Table(rows)


def _language(config: ModelConfig, hf_config: Any, saved: Collection[str]) -> Table:
    """The language model's own table; what the checkpoint holds of it is the checkpoint's, because it added tokens."""
    own = LANGUAGE[hf_config.model_type].table(config.language)
    rows, replaced = [], [copy.name for copy in own.copies]
    for one in own.rows:
        name = one.published[0]
        part = SAVED if SAVED + name in saved else LANGUAGE_PART
        replaced += [name] if part == SAVED else []
        rows.append(dataclasses.replace(one, published=(part + name,), ours=tuple(f"language/{path}" for path in one.ours)))
    copies = tuple(Copy(SAVED + copy.name, of=SAVED + copy.of) for copy in own.copies)
    return Table(tuple(rows), copies, ignored=tuple(LANGUAGE_PART + name for name in (*own.ignored, *replaced)))


def gated_name(name: str, every: int) -> str:
    """`lang_encoder.gpt_neox.layers.3.gated_cross_attn_layer.X` -> `gated.1.X` where every second layer has one."""
    match = re.fullmatch(r"lang_encoder\.[\w.]+?\.(\d+)\.gated_cross_attn_layer\.(.+)", name)
    if match and (int(match[1]) + 1) % every == 0:
        return GATED.format(int(match[1]) // every) + match[2]
    return name


def layer_name(name: str, layers: str, every: int) -> str:
    """The inverse of `gated_name`.

    Args:
      layers: of `language_layers`.
    """
    match = re.fullmatch(r"gated\.(\d+)\.(.+)", name)
    if not match:
        return name
    return f"{SAVED}{layers}.{(int(match[1]) + 1) * every - 1}.gated_cross_attn_layer.{match[2]}"


def language_layers(hf_config: Any) -> str:
    """Where the language model's layers are: "gpt_neox.layers"."""
    names = (one.published[0] for one in _own_table(hf_config).rows)
    return next(name.split(".{}")[0] for name in names if "{}" in name)


def embedding_name(hf_config: Any) -> str:
    """The checkpoint's name of the input embedding."""
    return SAVED + next(one.published[0] for one in _own_table(hf_config).rows if one.ours == ("embedding",))


def tied_names(hf_config: Any) -> dict[str, str]:
    """The checkpoint's name of a head that is the embedding -> that of the embedding."""
    return {SAVED + copy.name: SAVED + copy.of for copy in _own_table(hf_config).copies}


def vocabulary_names(hf_config: Any, saved: Collection[str]) -> list[str]:
    """The language model's own tensors with a row for each token that the checkpoint does not hold: a head that is not tied.

    Args:
      saved: the names in the checkpoint.
    """
    names = (one.published[0] for one in _own_table(hf_config).rows if one.axes.startswith("V"))
    return [name for name in names if SAVED + name not in saved]


def _own_table(hf_config: Any) -> Table:
    family = LANGUAGE[hf_config.model_type]
    return family.table(family.config_from_hf(hf_config))
