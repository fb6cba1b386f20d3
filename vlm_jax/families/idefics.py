"""IDEFICS (Laurencon et al. 2023), the open Flamingo: `IdeficsForVisionText2Text`.

Its processing is that of transformers' `IdeficsProcessor`, which needs PyTorch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Set as AbstractSet
from typing import Any

from vlm_jax.config import BlockConfig, DecoderConfig, GatedCrossAttentionConfig, ModelConfig, NormConfig, PerceiverConfig
from vlm_jax.config.generation import Settings
from vlm_jax.families import clip, llama
from vlm_jax.interop.hf_config import activation, max_positions, require, rope
from vlm_jax.interop.published import Family
from vlm_jax.interop.register import FAMILIES
from vlm_jax.interop.rows import norm
from vlm_jax.interop.table import Copy, Table, row
from vlm_jax.processing.conversation import Conversation, Text
from vlm_jax.processing.media import PublishedMedia
from vlm_jax.processing.published import PublishedProcessor

GATED = "model.gated_cross_attn_layers.{}."
RESAMPLER = "model.perceiver_resampler."
BLOCK = RESAMPLER + "blocks.{}."
IMAGE, AROUND, UTTERANCE_END = "<image>", "<fake_token_around_image>", "<end_of_utterance>"


def table(config: ModelConfig, hf_config: Any) -> Table:
    """Published names <-> the paths of a `VisionLanguageModel`."""
    return (
        clip.vision_table(config.vision).under("model.vision_model.", "vision/")
        + _resampler(config.connector)
        + _gated(config.fusion)
        + llama.body(config.language).under(ours="language/")
        + _head(config.language, hf_config.additional_vocab_size)
        + Table((), ignored=(f"{GATED}cross_attn.rotary_emb.inv_freq",))
    )


def _resampler(config: PerceiverConfig) -> Table:
    attention = "connector/layers/attention/"
    norms = [
        (f"{BLOCK}0.context_layer_norm", "connector/layers/feature_norm"),
        (f"{BLOCK}0.latents_layer_norm", "connector/layers/latent_norm"),
        (f"{BLOCK}1.ln", "connector/layers/mlp_norm"),
        (f"{RESAMPLER}layer_norm", "connector/norm"),
    ]
    if config.qk_norm:
        norms += [
            (f"{BLOCK}0.q_layer_norm", f"{attention}query_norm"),
            (f"{BLOCK}0.k_layer_norm", f"{attention}key_norm"),
        ]
    projections = (("q", "query"), ("k", "key"), ("v", "value"))
    rows = (
        row(f"{RESAMPLER}latents", "connector/latents", "R D -> R D"),
        *(row(f"{BLOCK}0.{name}_proj.weight", f"{attention}{ours}/kernel", "(N H) D -> D N H") for name, ours in projections),
        row(f"{BLOCK}0.output_proj.weight", f"{attention}out/kernel", "D (N H) -> N H D"),
        row(f"{BLOCK}1.fc.weight", "connector/layers/mlp/up/kernel", "F D -> D F"),
        row(f"{BLOCK}1.c_proj.weight", "connector/layers/mlp/down/kernel", "D F -> F D"),
        *(r for name, ours in norms for r in norm(name, ours)),
    )
    return Table(rows)


def _gated(config: GatedCrossAttentionConfig) -> Table:
    attention = "fusion/layers/attention/"
    projections = (("q", "query"), ("k", "key"), ("v", "value"))
    norms = [("input_layernorm", "attention_norm"), ("post_attention_layernorm", "mlp_norm")]
    if config.qk_norm:
        norms += [("cross_attn.q_layer_norm", "attention/query_norm"), ("cross_attn.k_layer_norm", "attention/key_norm")]
    rows = (
        row(f"{GATED}alpha_cross_attn", "fusion/layers/attention_gate", "() ->"),
        row(f"{GATED}alpha_dense", "fusion/layers/mlp_gate", "() ->"),
        *(
            row(f"{GATED}cross_attn.{p}_proj.weight", f"{attention}{ours}/kernel", "(N H) D -> D N H")
            for p, ours in projections
        ),
        row(f"{GATED}cross_attn.o_proj.weight", f"{attention}out/kernel", "D (N H) -> N H D"),
        row(f"{GATED}mlp.gate_proj.weight", "fusion/layers/mlp/gate/kernel", "F D -> D F"),
        row(f"{GATED}mlp.up_proj.weight", "fusion/layers/mlp/up/kernel", "F D -> D F"),
        row(f"{GATED}mlp.down_proj.weight", "fusion/layers/mlp/down/kernel", "D F -> F D"),
        *(row(f"{GATED}{published}.weight", f"fusion/layers/{ours}/scale", "D -> D") for published, ours in norms),
    )
    return Table(rows)


def _head(config: DecoderConfig, additional: int) -> Table:
    """The two embeddings and the two heads, each one after the other: the tokens that were added have their own."""
    if not additional:
        return llama.head(config).under(ours="language/")
    split = (config.vocab_size - additional, additional)
    embeddings = ("model.embed_tokens.weight", "model.embed_tokens.additional_embedding.weight")
    heads = ("lm_head.weight", "lm_head.additional_fc.weight")
    rows = (row(embeddings, "language/embedding", "V D -> V D", split=split),)
    if config.tied_head:
        return Table(rows, copies=tuple(Copy(name, of=of) for name, of in zip(heads, embeddings, strict=True)))
    return Table((*rows, row(heads, "language/lm_head/kernel", "V D -> D V", split=split)))


def config_from_hf(config: Any) -> ModelConfig:
    """`IdeficsConfig` -> ours."""
    require(config, use_resampler=True, alpha_type="float")
    positions = rope(config)
    perceiver = config.perceiver_config
    norm = NormConfig(kind="rms", eps=config.rms_norm_eps)
    head_width = config.hidden_size // config.num_attention_heads
    block = BlockConfig(
        width=config.hidden_size,
        heads=config.num_attention_heads,
        kv_heads=config.num_attention_heads,
        head_width=head_width,
        mlp_width=config.intermediate_size,
        activation=activation(config.hidden_act),
        gated_mlp=True,
        norm=norm,
        qkv_bias=False,
        out_bias=False,
        mlp_bias=False,
    )
    return ModelConfig(
        # The resampler reads every token of the last layer, the class token too, before `post_layernorm`.
        vision=dataclasses.replace(clip.vision_from_hf(config.vision_config), post_norm="held", class_token="kept"),
        connector=PerceiverConfig(
            latents=perceiver.resampler_n_latents,
            layers=perceiver.resampler_depth,
            heads=perceiver.resampler_n_heads,
            head_width=perceiver.resampler_head_dim,
            activation="relu",
            qk_norm=perceiver.qk_layer_norms_perceiver,
        ),
        fusion=GatedCrossAttentionConfig(
            every=config.cross_layer_interval,
            offset=0,
            heads=config.num_attention_heads,
            head_width=head_width,
            mlp_width=config.intermediate_size,
            activation=activation(config.hidden_act),
            gated_mlp=True,
            norm=norm,
            qk_norm=config.qk_layer_norms,
        ),
        language=DecoderConfig(
            vocab_size=config.vocab_size + config.additional_vocab_size,
            layers=config.num_hidden_layers,
            block=block,
            positions=positions,
            max_positions=max_positions(config, positions),
            window=None,
            tied_head=config.tie_word_embeddings,
        ),
    )


class IdeficsProcessor(PublishedProcessor):
    """A picture is one token, with a mark on each side that neighbours share; texts lose the spaces around them.

    Nothing behind an end token sees a picture until the next one.
    """

    def __init__(self, hf_processor: Any, ends: AbstractSet[int], defaults: Settings, side: int) -> None:
        self.resets_at = hf_processor.tokenizer.eos_token_id
        media = PublishedMedia(hf_processor.image_processor, side, tile_tokens=0)
        super().__init__(hf_processor, ends, defaults, media=media, image_token=IMAGE)
        self.template = ""  # the published processor reads lists of texts and pictures
        # A checkpoint that was trained on dialogues has a mark between one text and the next.
        self._between = UTTERANCE_END if UTTERANCE_END in hf_processor.tokenizer.all_special_tokens else ""

    def render_without_template(self, turns: Conversation) -> str:
        if not any(turn.role == "text" for turn in turns):
            return super().render_without_template(turns)
        text, before = "", None
        for part in (part for turn in turns for part in turn.content):
            if isinstance(part, Text) and isinstance(before, Text):
                text += self._between
            text += part.text.strip(" ") if isinstance(part, Text) else IMAGE
            before = part
        return text

    def postprocess_prompt(self, text: str) -> str:
        out, neighbours = self.tokenizer.begin, False
        for number, piece in enumerate(text.split(IMAGE)):
            if number:
                out += ("" if neighbours else AROUND) + IMAGE + AROUND
                neighbours = True
            if piece:
                out += piece.strip(" ")
                neighbours = False
        return out


FAMILIES.add("idefics")(
    Family(config_from_hf, table, lambda config, hf, *rest: IdeficsProcessor(*rest, config.vision.image_size))
)
