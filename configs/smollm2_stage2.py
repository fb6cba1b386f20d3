"""LLaVA's stage 2 at a size that trains on two CPU cores: the connector and SmolLM2-135M-Instruct answer easy-VQA's questions
and caption Tux Paint's stamps, from the run of `smollm2_stage1.py` on.

    python train.py --config=configs/smollm2_stage2.py --workdir=runs/stage2 --config.init_from=runs/stage1
    python infer.py --checkpoint=runs/stage2 --image=docs/blue_triangle.png --prompt="what is the blue shape?"
    python -m vlm_jax.evaluate --checkpoint=runs/stage2 --source=stamps --evaluator=ranking

Behind a colon, with commas between them:

- `without_stage1`: the parts start apart, the connector untrained.
- `lora`: the language model is frozen and has adapters; `qlora`: and is held in int8.
- `blind`: the control, every picture grey.

The first hundred updates read easy-VQA as LLaVA's conversations, in which a question sees those before it and their answers;
after them each question stands by itself, as it is asked in the test. In a conversation the language model soon learns to
compare what is named with what was said, and then with what it sees; 400 updates of single questions alone did not teach it.
The captions have batches of their own, with a small weight: a token of a caption has ten times the loss of an answer.
"""

import dataclasses

import ml_collections

from configs.smollm2_stage1 import DINOV2, SMOLLM2, data, model
from vlm_jax.config import (
    EasyVqaConfig,
    LoraConfig,
    MemberConfig,
    MixtureConfig,
    OptimizerConfig,
    ParamRule,
    PartInit,
    RunConfig,
    SetConfig,
    StampsConfig,
)
from vlm_jax.config_dict import to_config_dict

VISION = ParamRule(pattern="^vision", frozen=True)
ADAPTERS = (LoraConfig(pattern="^language/layers/", rank=64, alpha=128.0),)
FROZEN = {
    "lora": ParamRule(pattern="^language", frozen=True),
    "qlora": ParamRule(pattern="^language", frozen=True, frozen_dtype="int8"),
}
OPTIONS = ("without_stage1", "blind", *FROZEN)


def get_config(choice: str = "") -> ml_collections.ConfigDict:
    options = choice.split(",") if choice else []
    held = [option for option in options if option in FROZEN]
    if not set(options) <= set(OPTIONS) or len(held) > 1:
        raise ValueError(f"configs/smollm2_stage2.py:{choice}: expected, with commas between them, {', '.join(OPTIONS)}")
    members = (
        # 0.12 of 4,000 pictures are 104 updates.
        MemberConfig(name="conversations", source=EasyVqaConfig(conversations=True), weight=0.12, evaluate=False),
        MemberConfig(name="single", source=EasyVqaConfig(), phase=1),
    )
    see = dict(share_prefix=True, blank_images="blind" in options)
    questions = dataclasses.replace(data(MixtureConfig(members=members), rows=2, tokens=256, images=10), **see)
    captions = dataclasses.replace(data(StampsConfig(), rows=1, tokens=64, images=4), **see)
    optimizer = OptimizerConfig(
        lr=1.2e-4,
        warmup_steps=30,
        schedule="wsd",
        decay_steps=190,
        b2=0.98,
        weight_decay=0.0,
        rules=(VISION, ParamRule(pattern="^connector", lr=12.0)),
    )
    if held:
        trained = ParamRule(pattern="/lora/", lr=2.0)
        optimizer = dataclasses.replace(optimizer, rules=(trained, *optimizer.rules, FROZEN[held[0]]))
    parts = (PartInit(part="vision", checkpoint=DINOV2), PartInit(part="language", checkpoint=SMOLLM2))
    apart = "without_stage1" in options
    run = RunConfig(
        model=model(),
        data=questions,
        accumulated=(SetConfig(name="stamps", data=captions, weight=0.2, every=2),),
        optimizer=optimizer,
        adapters=ADAPTERS if held else (),
        steps=300,
        remat="dots",  # half the memory, and on these cores faster: less is written and read again
        eval_every=100,
        eval_rows=16,
        save_every=100,
        init_from="" if apart else "runs/stage1",
        init_parts=parts if apart else (),
    )
    return to_config_dict(run)
