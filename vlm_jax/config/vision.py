"""Vision encoders."""

from __future__ import annotations

import math
from typing import ClassVar, Literal

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


@frozen
class NfnetConfig(VisionConfig):
    """A normaliser-free network (Brock et al. 2021): convolutions whose kernels are standardised, and no norms.

    Features are those of the last layer, one for 32 x 32 pixels. NFNet-F6 has `depths=(7, 14, 42, 21)`, F0 a seventh of it.
    """

    kind: Literal["nfnet"] = "nfnet"
    image_size: int  # pixels of a side
    depths: tuple[int, ...]  # blocks of each stage
    channels: tuple[int, ...] = (256, 512, 1536, 1536)  # that leave each stage
    stem_width: int = 128
    group_width: int = 128  # channels that a 3 x 3 convolution mixes
    bottleneck: float = 0.5  # of a block's channels, within it
    squeeze: float = 0.5  # of a block's channels, where squeeze-and-excitation has looked at the whole picture
    alpha: float = 0.2  # times what a block adds
    final_width: int | None = 3072  # of a last 1 x 1 convolution; None: there is none
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)  # of the pixels in 0..1
    std: tuple[float, ...] = (0.229, 0.224, 0.225)

    patch_size: ClassVar[int] = 32
    front_features: ClassVar[int] = 0
    reads_shapes: ClassVar[bool] = False

    @property
    def width(self) -> int:
        return self.final_width or self.channels[-1]

    @property
    def frame_features(self) -> int:
        return math.ceil(self.image_size / self.patch_size) ** 2
