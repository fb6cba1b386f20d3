"""A Flamingo from scratch on easy-VQA, on two CPU cores in ten minutes.

    python train.py --config=configs/flamingo_easyvqa.py --workdir=runs/flamingo
    python infer.py --checkpoint=runs/flamingo --image=docs/blue_triangle.png --prompt="what is the blue shape?"

The control experiment, with every image blanked:

    python train.py --config=configs/flamingo_easyvqa.py --workdir=runs/blank --config.data.blank_images=True
"""

import ml_collections

from vlm_jax.config import (
    AugmentConfig,
    BlockConfig,
    DataConfig,
    DecoderConfig,
    EasyVqaConfig,
    GatedCrossAttentionConfig,
    ModelConfig,
    NormConfig,
    OptimizerConfig,
    ParamRule,
    PerceiverConfig,
    RopeConfig,
    RunConfig,
    SampleRule,
    VitConfig,
)
from vlm_jax.config_dict import to_config_dict


def get_config() -> ml_collections.ConfigDict:
    vision = BlockConfig(
        width=64,
        heads=4,
        kv_heads=4,
        head_width=16,
        mlp_width=192,
        activation="quick_gelu",
        gated_mlp=False,
        norm=NormConfig(kind="layer", eps=1e-5),
        qkv_bias=True,
        out_bias=True,
        mlp_bias=True,
        query_init=3.0,  # shapes are learned in a third of the steps: attention that starts even only averages colours
    )
    language = BlockConfig(
        width=128,
        heads=4,
        kv_heads=4,
        head_width=32,
        mlp_width=256,
        activation="silu",
        gated_mlp=True,
        norm=NormConfig(kind="rms", eps=1e-5),
        qkv_bias=False,
        out_bias=False,
        mlp_bias=False,
    )
    model = ModelConfig(
        vision=VitConfig(image_size=64, patch_size=8, layers=3, block=vision, position_init=0.5),
        connector=PerceiverConfig(latents=8, layers=2, heads=4, head_width=32, mlp_ratio=2),
        fusion=GatedCrossAttentionConfig(every=1, offset=0, heads=4, head_width=32, mlp_width=256),
        language=DecoderConfig(
            vocab_size=512,
            layers=2,
            block=language,
            positions=RopeConfig(base=10_000.0, scaling=None),
            max_positions=256,
            window=None,
            tied_head=True,
        ),
    )
    data = DataConfig(
        source=EasyVqaConfig(),
        tokenizer="train",
        vocab_size=512,
        prompt="{question}",
        answer=" {answer}",
        image_size=64,
        rows=10,
        tokens=192,
        images=4,
        # Half of all questions ask "is there a red shape?" and are soon known; one in eight names a shape, the slow part.
        sampling=(
            SampleRule(pattern=r"(red|green|blue|yellow|black|gray|teal|brown).* (yes|no)$", share=0.2),
            SampleRule(pattern=r" (yes|no)$", share=0.5),
            SampleRule(pattern=r"^what.* color", share=0.5),
        ),
        augment=AugmentConfig(shift=6),
    )
    optimizer = OptimizerConfig(
        lr=1.5e-3,
        warmup_steps=100,
        schedule="cosine",
        b2=0.99,
        weight_decay=0.05,
        rules=(
            ParamRule(pattern="gate$", lr=10.0, decay=0.0),  # one number each, closed at first
            ParamRule(pattern="^connector", lr=0.3, decay=0.0),  # slower than the encoder before it and the layers after it
            ParamRule(pattern="(scale|bias|embedding)$", decay=0.0),
        ),
    )
    run = RunConfig(model=model, data=data, optimizer=optimizer, steps=1700, eval_every=500, save_every=500, eval_rows=64)
    return to_config_dict(run)
