"""Published systems by name, four choices each: `system("llava-1.5-7b")`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from vlm_jax.config import GatedCrossAttentionConfig, InSequenceConfig, MlpProjectorConfig, ModelConfig, PerceiverConfig
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


def _llava(text: str, *, newline: bool = False) -> Callable[[], ModelConfig]:
    """LLaVA-1.5 (Liu et al. 2023) and LLaVA-NeXT: patches of CLIP's last layer but one, and two linear maps."""

    def make() -> ModelConfig:
        of_text = dataclasses.replace(language(text), vocab_size=LLAVA_TOKENS)
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
