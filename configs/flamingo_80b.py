"""Flamingo-80B (Alayrac et al. 2022) with the paper's own parts, for a pod; the recipe is that of `flamingo.py`.

    python -m vlm_jax.plan --config=configs/flamingo_80b.py --topology=v5p:8x8x8

The paper trained it on 1,536 TPU v4 for 15 days, each layer split over 16 devices. Here the trained parameters are split over
`fsdp`, and of the frozen language model every layer is gathered when it runs.
"""

import dataclasses

import ml_collections

from configs.flamingo import recipe
from vlm_jax.config import MeshConfig
from vlm_jax.config_dict import to_config_dict


def get_config() -> ml_collections.ConfigDict:
    return to_config_dict(dataclasses.replace(recipe("80b-published"), mesh=MeshConfig(data=1, fsdp=-1, tensor=1)))
