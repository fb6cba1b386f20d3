"""Every size and choice of a model, a data set and a run, as frozen dataclasses.

A recipe in `configs/` returns `to_config_dict(RunConfig(...))` of `config_dict.py`; `train.py` lets the command line override
any leaf (`--config.optimizer.lr=3e-4`) and turns it back, refusing unknown names and wrong types.

Where a part can be one of several kinds, its dataclass has a `kind` field that tells them apart.
"""

from vlm_jax.config.block import Activation, BlockConfig, ExpertsConfig, NormConfig
from vlm_jax.config.connector import MlpProjectorConfig, PerceiverConfig, ProjectionConfig
from vlm_jax.config.data import AugmentConfig, DataConfig, EasyVqaConfig, JsonLinesConfig, SampleRule
from vlm_jax.config.dual_encoder import DualEncoderConfig, ImageTowerConfig, TextTowerConfig
from vlm_jax.config.fusion import GatedCrossAttentionConfig, InSequenceConfig
from vlm_jax.config.language import (
    AlibiConfig,
    DecoderConfig,
    DynamicNtkScaling,
    LearnedPositionsConfig,
    LinearScaling,
    Llama3Scaling,
    LongRopeScaling,
    RopeConfig,
    YarnScaling,
)
from vlm_jax.config.model import ModelConfig
from vlm_jax.config.run import MeshConfig, OptimizerConfig, ParamRule, PartInit, RunConfig
from vlm_jax.config.vision import VitConfig

__all__ = [
    "Activation",
    "AlibiConfig",
    "AugmentConfig",
    "BlockConfig",
    "DataConfig",
    "DecoderConfig",
    "DualEncoderConfig",
    "DynamicNtkScaling",
    "EasyVqaConfig",
    "ExpertsConfig",
    "GatedCrossAttentionConfig",
    "ImageTowerConfig",
    "InSequenceConfig",
    "JsonLinesConfig",
    "LearnedPositionsConfig",
    "LinearScaling",
    "Llama3Scaling",
    "LongRopeScaling",
    "MeshConfig",
    "MlpProjectorConfig",
    "ModelConfig",
    "NormConfig",
    "OptimizerConfig",
    "ParamRule",
    "PartInit",
    "PerceiverConfig",
    "ProjectionConfig",
    "RopeConfig",
    "RunConfig",
    "SampleRule",
    "TextTowerConfig",
    "VitConfig",
    "YarnScaling",
]
