"""CLIP as OpenAI published it and open_clip writes it, and open_clip's pictures; the configuration is that of `clip.py`."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
from PIL import Image

from vlm_jax.config import DualEncoderConfig, VitConfig
from vlm_jax.interop.rows import DOWN, FROM_HEADS, FUSED, UP, linear, norm, patches, query_key_value
from vlm_jax.interop.table import Row, Table, row
from vlm_jax.processing.pictures import ImageError

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


@dataclasses.dataclass(frozen=True)
class OpenClipTransform:
    """Pictures as open_clip prepares them for inference (`image_transform` in its `transform.py`); called as transformers'
    picture processors are.

    torchvision's `Resize(side)` and `CenterCrop(side)`: the shorter side becomes `side` (bicubic) and the longer one follows,
    rounded down; the middle is cut where the nearest pixel is, halves to the even one. transformers' CLIP cuts half a pixel
    before that. The picture becomes RGB last: transparency is dropped, and a palette's colours are not mixed.

    Attributes:
      side: of the square in pixels.
    """

    side: int

    def __call__(self, picture: Image.Image, **settings: Any) -> dict[str, np.ndarray]:
        """
        Args:
          settings: transformers', which have no effect: the pixels are bytes.

        Returns:
          "pixel_values": [1, 3, side, side] uint8.

        Raises:
          ImageError: resized, a thin picture would be larger than Pillow's limit against decompression bombs.
        """
        short, long = sorted(picture.size)
        longer = int(self.side * long / short)
        limit = Image.MAX_IMAGE_PIXELS
        if limit and self.side * longer > limit:
            raise ImageError(
                f"{picture.width}x{picture.height} is too thin: resized to {self.side}x{longer} it has more than {limit:,} "
                "pixels (PIL.Image.MAX_IMAGE_PIXELS); cut it"
            )
        size = (self.side, longer) if picture.width <= picture.height else (longer, self.side)
        left, top = (round((length - self.side) / 2) for length in size)
        resized = picture.resize(size, Image.Resampling.BICUBIC)
        cut = resized.crop((left, top, left + self.side, top + self.side)).convert("RGB")
        return {"pixel_values": np.asarray(cut).transpose(2, 0, 1)[None]}
