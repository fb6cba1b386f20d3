"""Every size and choice of a model, a data set and a run, as frozen dataclasses.

A recipe in `configs/` returns `to_config_dict(RunConfig(...))` of `config_dict.py`; `train.py` lets the command line override
any leaf (`--config.optimizer.lr=3e-4`) and turns it back, refusing unknown names and wrong types.

A part with several kinds has a `kind` field that distinguishes them.
"""

from vlm_jax.config.block import Activation, BlockConfig, ExpertsConfig, NormConfig
from vlm_jax.config.connector import ConnectorConfig, MlpProjectorConfig, PerceiverConfig, PixelShuffleConfig, ProjectionConfig
from vlm_jax.config.data import (
    AugmentConfig,
    DataConfig,
    EasyVqaConfig,
    JsonLinesConfig,
    SampleRule,
    SourceConfig,
    StampsConfig,
)
from vlm_jax.config.dual_encoder import DualEncoderConfig, ImageTowerConfig, TextTowerConfig
from vlm_jax.config.evaluator import EvaluatorConfig
from vlm_jax.config.fusion import FusionConfig, GatedCrossAttentionConfig, InSequenceConfig
from vlm_jax.config.language import (
    AlibiConfig,
    DecoderConfig,
    DynamicNtkScaling,
    LanguageConfig,
    LearnedPositionsConfig,
    LinearScaling,
    Llama3Scaling,
    LongRopeScaling,
    PositionsConfig,
    RopeConfig,
    ScalingConfig,
    YarnScaling,
)
from vlm_jax.config.mixture import MemberConfig, MixtureConfig, SetConfig
from vlm_jax.config.model import ModelConfig
from vlm_jax.config.objective import NextTokenConfig, ObjectiveConfig
from vlm_jax.config.run import MeshConfig, OptimizerConfig, ParamRule, PartInit, RunConfig
from vlm_jax.config.sources import FieldsConfig, HuggingFaceConfig, TarConfig, TfdsConfig
from vlm_jax.config.vision import VisionConfig, VitConfig

__all__ = [
    "Activation",
    "AlibiConfig",
    "AugmentConfig",
    "BlockConfig",
    "ConnectorConfig",
    "DataConfig",
    "DecoderConfig",
    "DualEncoderConfig",
    "DynamicNtkScaling",
    "EasyVqaConfig",
    "EvaluatorConfig",
    "ExpertsConfig",
    "FieldsConfig",
    "FusionConfig",
    "GatedCrossAttentionConfig",
    "HuggingFaceConfig",
    "ImageTowerConfig",
    "InSequenceConfig",
    "JsonLinesConfig",
    "LanguageConfig",
    "LearnedPositionsConfig",
    "LinearScaling",
    "Llama3Scaling",
    "LongRopeScaling",
    "MemberConfig",
    "MeshConfig",
    "MixtureConfig",
    "MlpProjectorConfig",
    "ModelConfig",
    "NextTokenConfig",
    "NormConfig",
    "ObjectiveConfig",
    "OptimizerConfig",
    "ParamRule",
    "PartInit",
    "PerceiverConfig",
    "PixelShuffleConfig",
    "PositionsConfig",
    "ProjectionConfig",
    "RopeConfig",
    "RunConfig",
    "SampleRule",
    "ScalingConfig",
    "SetConfig",
    "SourceConfig",
    "StampsConfig",
    "TarConfig",
    "TextTowerConfig",
    "TfdsConfig",
    "VisionConfig",
    "VitConfig",
    "YarnScaling",
]
