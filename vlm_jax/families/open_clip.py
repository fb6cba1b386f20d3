"""CLIP as OpenAI published it and open_clip writes it; the configuration is that of `clip.py`."""

from __future__ import annotations

from vlm_jax.config import DualEncoderConfig, VitConfig
from vlm_jax.interop.rows import DOWN, FROM_HEADS, FUSED, UP, linear, norm, patches, query_key_value
from vlm_jax.interop.table import Row, Table, row

LAYER = "transformer.resblocks.{}."


def table(config: DualEncoderConfig) -> Table:
    """Published names <-> the paths of a `DualEncoder`. open_clip may write the text tower under `text.`."""
    entries = (
        row("token_embedding.weight", "encoder/embedding", "V D -> V D"),
        row("positional_embedding", "encoder/position_embedding", "T D -> T D"),
        *norm("ln_final", "encoder/final_norm"),
        row("text_projection", "projection/kernel", "D F -> D F"),
    )
    text = Table(_layers()).under(ours="encoder/") + Table(entries)
    image = vision_rows(config.image.encoder).under(ours="encoder/")
    image += Table((row("proj", "projection/kernel", "D F -> D F"),))
    scalars = ("input_resolution", "context_length", "vocab_size")  # of OpenAI's archives
    return (
        image.under("visual.", "image/")
        + text.under("[text.]", "text/")
        + Table((row("logit_scale", "logit_scale", "->"),), ignored=scalars)
    )


def vision_rows(config: VitConfig) -> Table:
    """The names behind `visual.` <-> the paths of a `Vit`; without `proj`."""
    entries = (
        *patches("conv1", config.patch_size, bias=config.patch_bias),
        row("class_embedding", "class_embedding", "D -> D"),
        row("positional_embedding", "position_embedding", "T D -> T D"),
        *norm("ln_pre", "pre_norm"),
        *_layers(),
    )
    return Table(entries + norm("ln_post", "post_norm"))


def _layers() -> tuple[Row, ...]:
    return (
        *linear(f"{LAYER}attn.in_proj", query_key_value("layers/attention"), FUSED, dot="_"),
        *linear(f"{LAYER}attn.out_proj", "layers/attention/out", FROM_HEADS),
        *norm(f"{LAYER}ln_1", "layers/attention_norm"),
        *norm(f"{LAYER}ln_2", "layers/mlp_norm"),
        *linear(f"{LAYER}mlp.c_fc", "layers/mlp/up", UP),
        *linear(f"{LAYER}mlp.c_proj", "layers/mlp/down", DOWN),
    )
