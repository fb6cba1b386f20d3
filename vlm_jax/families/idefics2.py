"""IDEFICS2 (Laurencon et al. 2024): `Idefics2ForConditionalGeneration`, and its processing."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Set as AbstractSet
from typing import Any

import numpy as np

from vlm_jax.config import InSequenceConfig, ModelConfig, NormConfig, PerceiverConfig, ProjectionConfig
from vlm_jax.config.generation import Settings
from vlm_jax.families import siglip
from vlm_jax.interop.files.source import PublishedError
from vlm_jax.interop.hf_config import activation
from vlm_jax.interop.published import Family
from vlm_jax.interop.register import FAMILIES, LANGUAGE
from vlm_jax.interop.rows import DOWN, FROM_HEADS, TO_HEADS, UP, linear, norm, query_key_value
from vlm_jax.interop.table import Table, row
from vlm_jax.processing.layout import Runs
from vlm_jax.processing.media import Medium, PublishedMedia
from vlm_jax.processing.pictures import Size
from vlm_jax.processing.published import PublishedProcessor

PROJECTION = "model.connector.modality_projection."
RESAMPLER = "model.connector.perceiver_resampler."
LAYER = RESAMPLER + "layers.{}."
CROPS = 5  # of a picture that is split: its quarters, and the whole


def config_from_hf(config: Any) -> ModelConfig:
    """`Idefics2Config` -> ours."""
    perceiver, text = config.perceiver_config, config.text_config
    language = LANGUAGE[text.model_type].config_from_hf(text)
    return ModelConfig(
        vision=siglip.vision_from_hf(config.vision_config, pooling_head=False, positions="bucketed"),
        connector=PerceiverConfig(
            latents=perceiver.resampler_n_latents,
            layers=perceiver.resampler_depth,
            heads=perceiver.resampler_n_heads,
            head_width=perceiver.resampler_head_dim,
            activation=activation(perceiver.hidden_act),
            norm=NormConfig(kind="rms", eps=perceiver.rms_norm_eps),
            kv_heads=perceiver.num_key_value_heads,
            gated_mlp=True,
            projection=ProjectionConfig(
                width=text.hidden_size, mlp_width=text.intermediate_size, activation=activation(text.hidden_act)
            ),
            per_frame=True,
        ),
        fusion=InSequenceConfig(),
        language=dataclasses.replace(language, tied_head=config.tie_word_embeddings),
    )


def table(config: ModelConfig, hf_config: Any) -> Table:
    """Published names <-> the paths of a `VisionLanguageModel`."""
    language = LANGUAGE[hf_config.text_config.model_type]
    spellings = {language.prefix: "model.text_model.", language.head: language.head}
    return (
        siglip.vision_table(config.vision).under("model.vision_model.", "vision/")
        + _connector()
        + language.table(config.language).renamed(spellings, "language/")
    )


def _connector() -> Table:
    ours, attention = "connector/layers", "connector/layers/attention"
    norms = (
        (f"{LAYER}input_context_norm", f"{ours}/feature_norm"),
        (f"{LAYER}input_latents_norm", f"{ours}/latent_norm"),
        (f"{LAYER}post_attention_layernorm", f"{ours}/mlp_norm"),
        (f"{RESAMPLER}norm", "connector/norm"),
    )
    heads = zip("qkv", query_key_value(attention), strict=True)
    mlps = ((PROJECTION, "connector/projection"), (f"{LAYER}mlp.", f"{ours}/mlp"))
    return Table(
        (
            row(f"{RESAMPLER}latents", "connector/latents", "R D -> R D"),
            *(r for name, path in heads for r in linear(f"{LAYER}self_attn.{name}_proj", path, TO_HEADS, bias=False)),
            *linear(f"{LAYER}self_attn.o_proj", f"{attention}/out", FROM_HEADS, bias=False),
            *(r for name, path in norms for r in norm(name, path, bias=False)),
            *(
                r
                for name, path in mlps
                for side in ("gate", "up")
                for r in linear(f"{name}{side}_proj", f"{path}/{side}", UP, bias=False)
            ),
            *(r for name, path in mlps for r in linear(f"{name}down_proj", f"{path}/down", DOWN, bias=False)),
        )
    )


@dataclasses.dataclass(frozen=True)
class Idefics2Media(PublishedMedia):
    """Pictures keep their shape; where they are split, a picture is its quarters and the whole of it."""

    crops: int = 1

    def runs(self, size: Size) -> Runs:
        return tuple(np.split(np.arange(self.crops * self.tile_tokens), self.crops))

    def tiles(self, size: Size) -> int:
        return self.crops

    def pixels(self, medium: Medium) -> list[np.ndarray]:
        # transformers' processor makes RGB of a picture before its picture processor has it: transparency is dropped.
        return self.tiled(medium[0], self.opened(medium).convert("RGB"), do_pad=False)


class Idefics2Processor(PublishedProcessor):
    """Each crop of a picture is some `<image>` tokens between two `<fake_token_around_image>`."""

    def __init__(self, hf_processor: Any, ends: AbstractSet[int], defaults: Settings, count: int) -> None:
        """
        Args:
          count: visual tokens of a crop.

        Raises:
          PublishedError: the processor writes another number of `<image>` tokens.
        """
        if hf_processor.image_seq_len != count:
            raise PublishedError(
                f"image_seq_len={hf_processor.image_seq_len} in the processor's config, and the model makes {count} visual "
                "tokens of a picture (perceiver_config.resampler_n_latents): set it to that"
            )
        crops = CROPS if hf_processor.image_processor.do_image_splitting else 1
        token, fake = hf_processor.image_token, hf_processor.fake_image_token
        self._written = f"{fake}{token}{fake}" * crops
        self._fake, self._behind = fake, re.compile(rf"{re.escape(fake)}(?=[^\s<])")
        size = hf_processor.image_processor.size
        side = max(size.longest_edge or size.height, size.shortest_edge or size.width)
        media = Idefics2Media(hf_processor.image_processor, side, count, crops=crops)
        super().__init__(hf_processor, ends, defaults, media=media, image_token=token)

    def postprocess_prompt(self, text: str) -> str:
        # Neighbours share the token between them, and a word behind one begins as a word.
        text = text.replace(self.image_token, self._written).replace(self._fake * 2, self._fake)
        return self._behind.sub(f"{self._fake} ", text)


FAMILIES.add("idefics2")(
    Family(config_from_hf, table, lambda config, hf, *rest: Idefics2Processor(*rest, config.connector.latents))
)
