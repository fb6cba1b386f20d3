"""Vision encoders."""

from __future__ import annotations

from typing import Literal

from vlm_jax.config.block import BlockConfig
from vlm_jax.config.frozen import Kinds, frozen


@frozen
class VisionConfig(Kinds):
    """A vision encoder: pictures -> features.

    Attributes of every kind:
      image_size: pixels of a side; patch_size: pixels of a patch's.
      width: of a feature; frame_features: how many there are of a picture of `image_size`.
      front_features: how many of these stand before those of the patches.
      reads_shapes: whether the pictures of a batch may differ in size.
      mean, std: of the pixels in 0..1.
    """


@frozen
class VitConfig(VisionConfig):
    """The vision transformer (Dosovitskiy et al. 2021): CLIP's, SigLIP's, DINOv2's and EVA-CLIP's are settings of it."""

    kind: Literal["vit"] = "vit"
    image_size: int  # pixels of a side
    patch_size: int
    layers: int
    block: BlockConfig
    class_token: Literal["none", "dropped", "kept"] = "dropped"  # SigLIP has none; the others' may be among the features
    registers: int = 0  # learned tokens behind it (Darcet et al. 2024)
    keep_registers: bool = False  # among the features, as LLaVA has them
    patch_bias: bool = False
    pre_norm: bool = True  # before the first block; CLIP alone
    # Which hidden state leaves: -1 the last, -2 the one before (LLaVA), 0 the embeddings. Of several, the features of a patch
    # are joined, in this order (ViP-LLaVA).
    feature_layer: int | tuple[int, ...] = -1
    # After the last block; OpenFlamingo and LLaVA take the features before it. "held": loaded and exported, but not applied to
    # the features.
    post_norm: Literal["none", "held", "applied"] = "applied"
    mask_token: bool = False  # DINOv2's, for masked pretraining; held
    pooling_head: bool = False  # SigLIP's, where a language model reads the features before it; held
    position_init: float | None = None  # deviation the positions start with; None: width ** -0.5, as CLIP's
    # Of pictures of another size: the learned square of positions is resized, or each patch takes the nearest one before it
    # (NaViT, Dehghani et al. 2023, as IDEFICS2 has it), and pictures of a batch may differ in size.
    positions: Literal["interpolated", "bucketed"] = "interpolated"
    antialias: bool = False  # of positions that are interpolated; DINOv2 with registers
    learned_size: int | None = None  # pixels of a side the positions are learned for; None: `image_size`
    mean: tuple[float, ...] = (0.48145466, 0.4578275, 0.40821073)  # of the pixels in 0..1
    std: tuple[float, ...] = (0.26862954, 0.26130258, 0.27577711)

    @property
    def width(self) -> int:
        return self.block.width * len(self.feature_layers)

    @property
    def feature_layers(self) -> tuple[int, ...]:
        """`feature_layer`, also of one."""
        return (self.feature_layer,) if isinstance(self.feature_layer, int) else self.feature_layer

    @property
    def reads_shapes(self) -> bool:
        return self.positions == "bucketed"

    @property
    def frame_features(self) -> int:
        """Number of features of an image of `image_size`."""
        return (self.image_size // self.patch_size) ** 2 + self.front_features

    @property
    def front_features(self) -> int:
        """Number of features before those of the patches."""
        return (self.class_token == "kept") + self.registers * self.keep_registers
