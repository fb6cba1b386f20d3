"""LLaVA's stage 2 at a size that trains on two CPU cores: the connector and SmolLM2-135M-Instruct learn to answer easy-VQA's
questions, from the run of `smollm2_stage1.py` on.

    python train.py --config=configs/smollm2_stage2.py --workdir=runs/stage2 --config.init_from=runs/stage1
    python infer.py --checkpoint=runs/stage2 --image=docs/blue_triangle.png --prompt="what is the blue shape?"

With `:without_stage1` the parts start apart, the connector untrained.
"""

import dataclasses

import ml_collections

from configs.smollm2_stage1 import DINOV2, SMOLLM2, data, model
from vlm_jax.config import EasyVqaConfig, OptimizerConfig, ParamRule, PartInit, RunConfig
from vlm_jax.config_dict import to_config_dict


def get_config(option: str = "") -> ml_collections.ConfigDict:
    if option not in ("", "without_stage1"):
        raise ValueError(f"configs/smollm2_stage2.py:{option}: expected nothing behind the colon, or without_stage1")
    optimizer = OptimizerConfig(
        lr=3e-4,
        warmup_steps=20,
        weight_decay=0.0,
        rules=(ParamRule(pattern="^vision", frozen=True), ParamRule(pattern="^connector", lr=3.0)),
    )
    sets = data(EasyVqaConfig(), rows=4, tokens=256, images=4)
    parts = (PartInit(part="vision", checkpoint=DINOV2), PartInit(part="language", checkpoint=SMOLLM2))
    run = RunConfig(
        model=model(),
        data=dataclasses.replace(sets, share_prefix=True),
        optimizer=optimizer,
        steps=500,
        eval_every=100,
        eval_rows=16,
        save_every=100,
        init_from="" if option else "runs/stage1",
        init_parts=parts if option else (),
    )
    return to_config_dict(run)
