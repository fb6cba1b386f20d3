"""Flamingo's few-shot captioning at a size that trains on two CPU cores: frozen DINOv2-S and SmolLM2-135M-Instruct, joined by
a Perceiver resampler and gated cross-attention, learn from episodes of five captioned stamps. Food and plants are never seen.

    apt-get install --no-install-recommends tuxpaint-stamps-default
    python train.py --config=configs/flamingo_stamps.py --workdir=runs/few_shot
    python -m vlm_jax.evaluate --checkpoint=runs/few_shot --evaluator=ranking:name=shots_0 \\
        --evaluator=ranking:name=shots_1,shots=1 --evaluator=ranking:name=shots_4,shots=4

The shots are other pictures of food and plants, with their captions.
"""

import dataclasses

import ml_collections

from configs.flamingo_smollm2 import recipe
from configs.smollm2_stage1 import SIDE, model
from vlm_jax.config import AugmentConfig, EpisodesConfig, StampsConfig
from vlm_jax.config_dict import to_config_dict

UNSEEN = ("food", "plants")


def get_config() -> ml_collections.ConfigDict:
    run = recipe()
    data = dataclasses.replace(
        run.data,
        source=EpisodesConfig(source=StampsConfig(held_out=UNSEEN), examples=5),
        image_size=SIDE,
        rows=2,
        tokens=256,
        images=25,
        augment=AugmentConfig(),
        cache_features=True,
    )
    run = dataclasses.replace(
        run,
        model=dataclasses.replace(run.model, vision=model().vision),
        data=data,
        steps=200,
        eval_every=50,
        save_every=50,
    )
    return to_config_dict(run)
