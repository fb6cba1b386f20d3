"""A package of its own that adds to vlm_jax a connector, an objective, a source and a published family.

It is found by its entry point (`outside_parts-1.0.dist-info`), as an installed package is.
"""

from __future__ import annotations

import csv
import dataclasses
from pathlib import Path
from typing import Any, Literal

import flax.linen as nn
import jax.numpy as jnp
import optax
from transformers import AutoConfig, LlavaConfig

from vlm_jax.config import ConnectorConfig, DataConfig, ModelConfig, ObjectiveConfig, SourceConfig
from vlm_jax.config.frozen import frozen
from vlm_jax.config.register import MODULES
from vlm_jax.data.example import SOURCES, Example, Source, Split
from vlm_jax.families import llava
from vlm_jax.interop.published import Family
from vlm_jax.interop.register import FAMILIES
from vlm_jax.interop.table import Table, row
from vlm_jax.layers.linear import Linear
from vlm_jax.processing.conversation import Medium, Text, assistant, user
from vlm_jax.processing.media import PublishedMedia
from vlm_jax.processing.published import PublishedProcessor
from vlm_jax.training.objective import OBJECTIVES
from vlm_jax.training.objectives.next_token import NextToken, sums_of

# A connector ---------------------------------------------------------------------------------------------------------


@frozen
class PairsConfig(ConnectorConfig):
    """The means of two neighbouring features, and a linear map."""

    kind: Literal["outside_pairs"] = "outside_pairs"
    width: int

    def visual_width(self, features_width: int) -> int:
        return self.width

    def visual_tokens(self, frames: int, features: int) -> int:
        return frames * features // 2


@MODULES.add(PairsConfig)
class Pairs(nn.Module):
    config: PairsConfig
    width: int
    dtype: Any

    @nn.compact
    def __call__(self, features: Any, frames: Any, *, mask: Any = None, return_attention: bool = False) -> tuple[Any, None]:
        pairs = features.reshape(*features.shape[:2], -1, 2, self.width).mean(axis=3)
        return Linear({"embed": self.width}, {"mlp": self.config.width}, False, self.dtype, name="map")(pairs), None


# An objective --------------------------------------------------------------------------------------------------------


@frozen
class SmoothedConfig(ObjectiveConfig):
    kind: Literal["outside_smoothed"] = "outside_smoothed"
    share: float  # of the probability that all other tokens get


@OBJECTIVES.add(SmoothedConfig)
class Smoothed(NextToken):
    """Cross-entropy with smoothed labels; checkpoints are ranked by how certain it is of right answers."""

    checkpoint_metric = "token_accuracy"

    def sums(self, model: nn.Module, params: Any, batch: Any, *, recompute: bool = True) -> Any:
        logits = model.apply({"params": params}, batch)
        labels = optax.smooth_labels(jnp.eye(logits.shape[-1])[batch.targets], self.config.share)
        return sums_of(optax.softmax_cross_entropy(logits, labels), jnp.argmax(logits, axis=-1) == batch.targets, batch)

    def training_line(self, metrics: dict[str, float]) -> str:
        return f"smoothed loss {metrics['loss']:.4f}"


# A source ------------------------------------------------------------------------------------------------------------


@frozen
class TableConfig(SourceConfig):
    """Rows of picture, question and answer."""

    kind: Literal["outside_table"] = "outside_table"
    train: str
    eval: str


class TableSource(Source):
    def __init__(self, path: Path) -> None:
        with path.open(newline="") as file:
            self._rows = list(csv.reader(file))
        self._path, self.fingerprint = path, repr((str(path), self._rows))

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Example:
        picture, question, answer = self._rows[index]
        turns = (user(Medium(0), Text(question)), assistant(answer))
        return Example(id=f"{self._path}:{index + 1}", media=((str(self._path.parent / picture),),), conversations=(turns,))


@SOURCES.add(TableConfig)
def open_table(config: DataConfig, split: Split) -> TableSource:
    return TableSource(Path(getattr(config.source, split)))


# A published family: LLaVA's towers around the connector above ---------------------------------------------------------


class OutsideConfig(LlavaConfig):
    model_type = "outside_llava"


AutoConfig.register(OutsideConfig.model_type, OutsideConfig)


def config_from_hf(config: Any) -> ModelConfig:
    whole = llava.config_from_hf(config)
    return dataclasses.replace(whole, connector=PairsConfig(width=whole.language.width))


def table(config: ModelConfig, hf_config: Any) -> Table:
    return llava.towers(config, hf_config) + Table((row("pairs.weight", "connector/map/kernel", "W D -> D W"),))


def processor(config: ModelConfig, hf_config: Any, hf_processor: Any, *rest: Any) -> PublishedProcessor:
    media = PublishedMedia(hf_processor.image_processor, config.vision.image_size, config.visual_tokens_in_sequence)
    return PublishedProcessor(hf_processor, *rest, media=media, image_token=hf_processor.image_token)


FAMILIES.add(OutsideConfig.model_type)(Family(config_from_hf, table, processor))
