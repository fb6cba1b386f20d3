"""Rows of linear maps and norms, and those of the transformer layers that transformers' vision and text towers share."""

from __future__ import annotations

from vlm_jax.config import BlockConfig
from vlm_jax.interop.table import Row, row

LAYER = "encoder.layers.{}."
TO_HEADS = ("(N H) D -> D N H", "(N H) -> N H")
FUSED = ("(J N H) D -> D N H", "(J N H) -> N H")  # query, key and value as one
FUSED_BY_HEAD = ("(N J H) D -> D N H", "(N J H) -> N H")
FROM_HEADS = ("D (N H) -> N H D", "D -> D")
UP = ("F D -> D F", "F -> F")
DOWN = ("D F -> F D", "D -> D")


def linear(
    published: str, ours: str | tuple[str, ...], axes: tuple[str, str], *, bias: bool = True, dot: str = "."
) -> tuple[Row, ...]:
    """A linear map, or several of ours that are fused into a published one.

    Args:
      axes: of the weight and of the bias.
      dot: between the name and "weight" or "bias".
    """
    paths = (ours,) if isinstance(ours, str) else ours
    weight = row(f"{published}{dot}weight", tuple(f"{path}/kernel" for path in paths), axes[0])
    return (weight, row(f"{published}{dot}bias", tuple(f"{path}/bias" for path in paths), axes[1])) if bias else (weight,)


def norm(published: str, ours: str, *, bias: bool = True) -> tuple[Row, ...]:
    """A layer norm, or without a bias also an RMSNorm."""
    weight = row(f"{published}.weight", f"{ours}/scale", "D -> D")
    return (weight, row(f"{published}.bias", f"{ours}/bias", "D -> D")) if bias else (weight,)


def patches(published: str, patch: int, *, bias: bool) -> tuple[Row, ...]:
    """The convolution that is our patch embedding."""
    rows = (row(f"{published}.weight", "patch_embedding/kernel", "D C Y X -> (Y X C) D", C=3, Y=patch, X=patch),)
    return (*rows, row(f"{published}.bias", "patch_embedding/bias", "D -> D")) if bias else rows


def query_key_value(attention: str) -> tuple[str, ...]:
    """Our paths of what is often one published tensor."""
    return tuple(f"{attention}/{name}" for name in ("query", "key", "value"))


def attention(block: BlockConfig) -> tuple[Row, ...]:
    """`self_attn` of CLIP and SigLIP."""
    names = zip("qkv", query_key_value("layers/attention"), strict=True)
    return (
        *(r for name, ours in names for r in linear(f"{LAYER}self_attn.{name}_proj", ours, TO_HEADS, bias=block.qkv_bias)),
        *linear(f"{LAYER}self_attn.out_proj", "layers/attention/out", FROM_HEADS, bias=block.out_bias),
    )


def norms_and_mlp(block: BlockConfig) -> tuple[Row, ...]:
    """The rest of a layer of CLIP, SigLIP and BLIP-2's EVA-CLIP."""
    return (
        *norm(f"{LAYER}layer_norm1", "layers/attention_norm"),
        *norm(f"{LAYER}layer_norm2", "layers/mlp_norm"),
        *linear(f"{LAYER}mlp.fc1", "layers/mlp/up", UP, bias=block.mlp_bias),
        *linear(f"{LAYER}mlp.fc2", "layers/mlp/down", DOWN, bias=block.mlp_bias),
    )
