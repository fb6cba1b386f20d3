"""Published systems by name, four choices each: `system("llava-1.5-7b")`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from vlm_jax.config import (
    GatedCrossAttentionConfig,
    InSequenceConfig,
    MlpProjectorConfig,
    ModelConfig,
    NormConfig,
    PerceiverConfig,
    ProjectionConfig,
)
from vlm_jax.config.register import Register
from vlm_jax.models.sizes import language, vision

SYSTEMS: Register[Callable[[], ModelConfig]] = Register("a published system of the name")
LLAVA_TOKENS = 32_064  # rows of the hub's embeddings: 32,000 of the language model, `<image>`, a padding token, and room


def system(name: str) -> ModelConfig:
    """
    Raises:
      RegisterError: an unknown name; the message lists those that are known.
    """
    return SYSTEMS[name]()


def _llava(text: str, *, newline: bool = False, tokens: int = LLAVA_TOKENS) -> Callable[[], ModelConfig]:
    """LLaVA-1.5 (Liu et al. 2023) and LLaVA-NeXT: patches of CLIP's last layer but one, and two linear maps."""

    def make() -> ModelConfig:
        of_text = dataclasses.replace(language(text), vocab_size=tokens)
        tower = dataclasses.replace(vision("clip-l/14-336"), feature_layer=-2, post_norm="held", class_token="dropped")
        return ModelConfig(
            vision=tower,
            connector=MlpProjectorConfig(width=of_text.block.width),
            fusion=InSequenceConfig(newline=newline),
            language=of_text,
        )

    return make


SYSTEMS.add("llava-1.5-7b")(_llava("vicuna-7b"))
SYSTEMS.add("llava-1.5-13b")(_llava("vicuna-13b"))
SYSTEMS.add("bakllava-7b")(_llava("mistral-7b"))
SYSTEMS.add("llava-next-vicuna-7b")(_llava("vicuna-7b", newline=True))
SYSTEMS.add("llava-next-vicuna-13b")(_llava("vicuna-13b", newline=True))
SYSTEMS.add("llava-next-34b")(_llava("yi-34b", newline=True, tokens=64_064))


def _idefics(text: str) -> Callable[[], ModelConfig]:
    """IDEFICS (Laurencon et al. 2023): Flamingo around LLaMA and CLIP ViT-H/14, whose every token the resampler reads."""

    def make() -> ModelConfig:
        of_text = language(text)
        block = of_text.block
        return ModelConfig(
            vision=dataclasses.replace(vision("clip-h/14"), post_norm="held", class_token="kept"),
            connector=PerceiverConfig(latents=64, layers=6, heads=16, head_width=96, activation="relu", qk_norm=True),
            fusion=GatedCrossAttentionConfig(
                every=4,
                offset=0,
                heads=block.heads,
                head_width=block.head_width,
                mlp_width=block.mlp_width,
                activation="silu",
                gated_mlp=True,
                norm=block.norm,
                qk_norm=True,
            ),
            language=dataclasses.replace(of_text, vocab_size=of_text.vocab_size + 2),
        )

    return make


SYSTEMS.add("idefics-9b")(_idefics("llama-7b"))
SYSTEMS.add("idefics-80b")(_idefics("llama-65b"))


@SYSTEMS.add("idefics2-8b")
def _idefics2() -> ModelConfig:
    """IDEFICS2 (Laurencon et al. 2024): SigLIP at any size, a resampler as wide as Mistral, 64 visual tokens of a picture."""
    of_text = dataclasses.replace(language("mistral-7b"), vocab_size=32_003)
    block = of_text.block
    return ModelConfig(
        vision=dataclasses.replace(vision("siglip-so400m/14-980"), positions="bucketed"),
        connector=PerceiverConfig(
            latents=64,
            layers=3,
            heads=16,
            head_width=96,
            kv_heads=4,
            activation="silu",
            gated_mlp=True,
            norm=NormConfig(kind="rms", eps=1e-6),
            projection=ProjectionConfig(width=block.width, mlp_width=block.mlp_width, activation="silu"),
            per_frame=True,
        ),
        fusion=InSequenceConfig(),
        language=of_text,
    )


@SYSTEMS.add("paligemma-3b")
def _paligemma() -> ModelConfig:
    """PaliGemma (Beyer et al. 2024) at 224 pixels: SigLIP, a linear map, and Gemma as a prefix-LM."""
    of_text = dataclasses.replace(language("gemma-2b"), vocab_size=257_216)
    return ModelConfig(
        vision=vision("siglip-so400m/14"),
        connector=MlpProjectorConfig(width=of_text.block.width, layers=1),
        fusion=InSequenceConfig(prefix_lm=True),
        language=of_text,
    )


def _flamingo(text: str, *, every: int) -> Callable[[], ModelConfig]:
    """Flamingo (Alayrac et al. 2022, tables 4 and 5) around public parts: CLIP ViT-L/14, as in its table 10, in the place of
    NFNet-F6, and an open language model of its Chinchilla's layers, width and heads. The resampler is as wide as CLIP."""

    def make() -> ModelConfig:
        of_text = language(text)
        width = of_text.block.width
        return ModelConfig(
            vision=dataclasses.replace(vision("clip-l/14"), post_norm="held", class_token="dropped"),
            connector=PerceiverConfig(latents=64, layers=6, heads=16, head_width=96, time_embeddings=8),
            fusion=GatedCrossAttentionConfig(
                every=every, offset=0, heads=of_text.block.heads, head_width=of_text.block.head_width, mlp_width=4 * width
            ),
            language=of_text,
        )

    return make


SYSTEMS.add("flamingo-3b")(_flamingo("mpt-1b", every=1))
SYSTEMS.add("flamingo-9b")(_flamingo("mpt-7b", every=4))


def _published_flamingo(text: str, *, every: int) -> Callable[[], ModelConfig]:
    """Flamingo with the paper's own parts, which are not public: NFNet-F6 at 320 pixels, and Chinchilla.

    Its table 4 gives the 9B model 40 layers and 10 gated ones, and table 5 the parameters of 32 and 8, which are taken. The
    resampler is 1,536 wide, as the last stage of NFNet-F6, whose last convolution would make it 3,072: it is left out.
    """

    def make() -> ModelConfig:
        of_text = dataclasses.replace(language(text), vocab_size=32_002)  # <image>, <EOC>
        sizes = dict(heads=of_text.block.heads, head_width=of_text.block.head_width, mlp_width=4 * of_text.block.width)
        return ModelConfig(
            vision=dataclasses.replace(vision("nfnet-f6"), image_size=320, final_width=None),
            connector=PerceiverConfig(latents=64, layers=6, heads=16, head_width=96, time_embeddings=8),
            fusion=GatedCrossAttentionConfig(every=every, offset=0, **sizes),
            language=of_text,
        )

    return make


SYSTEMS.add("flamingo-3b-published")(_published_flamingo("chinchilla-1.4b", every=1))
SYSTEMS.add("flamingo-9b-published")(_published_flamingo("chinchilla-7b", every=4))
SYSTEMS.add("flamingo-80b-published")(_published_flamingo("chinchilla-70b", every=7))


def _openflamingo(text: str, *, every: int) -> Callable[[], ModelConfig]:
    """OpenFlamingo (Awadalla et al. 2023): its `helpers.py` and `factory.py`."""

    def make() -> ModelConfig:
        of_text = language(text)
        sizes = dict(heads=8, head_width=64, activation="gelu")
        return ModelConfig(
            vision=dataclasses.replace(vision("clip-l/14"), post_norm="held", class_token="dropped"),
            connector=PerceiverConfig(latents=64, layers=6, **sizes),
            fusion=GatedCrossAttentionConfig(every=every, offset=every - 1, mlp_width=4 * of_text.block.width, **sizes),
            language=of_text,
        )

    return make


SYSTEMS.add("openflamingo-3b")(_openflamingo("mpt-1b", every=1))
SYSTEMS.add("openflamingo-4b")(_openflamingo("redpajama-3b", every=2))
SYSTEMS.add("openflamingo-9b")(_openflamingo("mpt-7b", every=4))
