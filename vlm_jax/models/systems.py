"""Published systems by name, four choices each: `system("llava-1.5-7b")`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from vlm_jax.config import InSequenceConfig, MlpProjectorConfig, ModelConfig
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
