"""Every size and choice of a model, a data set and a run, as frozen dataclasses.

A recipe in `configs/` returns `to_config_dict(RunConfig(...))` of `config_dict.py`; `train.py` lets the command line override
any leaf (`--config.optimizer.lr=3e-4`) and turns it back, refusing unknown names and wrong types.

A part with several kinds has a `kind` field that distinguishes them.
"""

from vlm_jax.config.block import Activation, BlockConfig, ExpertsConfig, NormConfig
from vlm_jax.config.connector import (
    ConnectorConfig,
    MlpProjectorConfig,
    PerceiverConfig,
    PixelShuffleConfig,
    ProjectionConfig,
    ResidualMlpConfig,
    TransformerResamplerConfig,
)
from vlm_jax.config.data import (
    AugmentConfig,
    DataConfig,
    EasyVqaConfig,
    EasyVqaPairsConfig,
    EmojiConfig,
    EpisodesConfig,
    FashionMnistConfig,
    JsonLinesConfig,
    SampleRule,
    SourceConfig,
    StampsConfig,
)
from vlm_jax.config.dual_encoder import DualEncoderConfig, ImageTowerConfig, TextTowerConfig
from vlm_jax.config.evaluator import (
    EvaluatorConfig,
    GenerationConfig,
    RankingConfig,
    RetrievalConfig,
    SamplesConfig,
    ZeroShotConfig,
)
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
from vlm_jax.config.model import ModelConfig, SystemConfig
from vlm_jax.config.objective import ContrastiveConfig, NextTokenConfig, ObjectiveConfig, PreferenceConfig
from vlm_jax.config.run import LoraConfig, MeshConfig, OptimizerConfig, ParamRule, PartInit, RunConfig
from vlm_jax.config.sources import FieldsConfig, HuggingFaceConfig, TarConfig, TfdsConfig
from vlm_jax.config.vision import NfnetConfig, VisionConfig, VitConfig

__all__ = [
    "Activation",
    "AlibiConfig",
    "AugmentConfig",
    "BlockConfig",
    "ConnectorConfig",
    "ContrastiveConfig",
    "DataConfig",
    "DecoderConfig",
    "DualEncoderConfig",
    "DynamicNtkScaling",
    "EasyVqaConfig",
    "EasyVqaPairsConfig",
    "EmojiConfig",
    "EpisodesConfig",
    "EvaluatorConfig",
    "ExpertsConfig",
    "FashionMnistConfig",
    "FieldsConfig",
    "FusionConfig",
    "GatedCrossAttentionConfig",
    "GenerationConfig",
    "HuggingFaceConfig",
    "ImageTowerConfig",
    "InSequenceConfig",
    "JsonLinesConfig",
    "LanguageConfig",
    "LearnedPositionsConfig",
    "LinearScaling",
    "Llama3Scaling",
    "LongRopeScaling",
    "LoraConfig",
    "MemberConfig",
    "MeshConfig",
    "MixtureConfig",
    "MlpProjectorConfig",
    "ModelConfig",
    "NextTokenConfig",
    "NfnetConfig",
    "NormConfig",
    "ObjectiveConfig",
    "OptimizerConfig",
    "ParamRule",
    "PartInit",
    "PerceiverConfig",
    "PixelShuffleConfig",
    "PositionsConfig",
    "PreferenceConfig",
    "ProjectionConfig",
    "RankingConfig",
    "ResidualMlpConfig",
    "RetrievalConfig",
    "RopeConfig",
    "RunConfig",
    "SampleRule",
    "SamplesConfig",
    "ScalingConfig",
    "SetConfig",
    "SourceConfig",
    "StampsConfig",
    "SystemConfig",
    "TarConfig",
    "TextTowerConfig",
    "TfdsConfig",
    "TransformerResamplerConfig",
    "VisionConfig",
    "VitConfig",
    "YarnScaling",
    "ZeroShotConfig",
]
