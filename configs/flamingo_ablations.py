"""Flamingo's ablations (Alayrac et al. 2022, tables 3 and 10): the baseline and every row of them.

    python -m vlm_jax.ablate --base=configs/flamingo_ablations.py
    python -m vlm_jax.ablate --base=configs/flamingo_ablations.py --rows=every-4th,vanilla --workdir=runs/ablations
    python -m vlm_jax.plan --config=configs/flamingo_ablations.py:every-4th --topology=v4:4x4x4

Behind the colon stands a row, and after a comma the size: `3b-published`, the only one so far, is Flamingo-3B with the paper's
own parts, to count, to plan, and to train where its data are.
"""

import dataclasses

import ml_collections

from configs.flamingo import CLIP, recipe
from vlm_jax.ablations.table import TABLES, Base, Kit
from vlm_jax.config import PartInit
from vlm_jax.config_dict import to_config_dict
from vlm_jax.models.sizes import vision
from vlm_jax.models.systems import system

TABLE = "flamingo"


def published() -> Base:
    """Flamingo-3B. A grafted layer has 16 D^2 parameters, of which 20 make the paper's 3.3B; nine feed-forwards have those of
    the resampler's six layers; its other sizes have half and twice as many layers (the paper: 0.1B less, 0.2B more)."""
    clip = system("flamingo-3b").vision
    small = dataclasses.replace(vision("nfnet-f0"), image_size=320, final_width=None)
    run = recipe("3b-published")
    return Base(
        run=run,
        kit=Kit(
            frozen_layers=run.model.language.layers,
            encoders={"other": (clip, PartInit(part="vision", checkpoint=CLIP)), "small": (small, None)},
            grafted_layers=20,
            mlp_layers=9,
            resamplers={"small": dict(layers=3), "large": dict(layers=12)},
        ),
    )


BASES = {"3b-published": published}


def base(size: str) -> Base:
    """
    Raises:
      ValueError: an unknown size.
    """
    if size not in BASES:
        raise ValueError(f"size {size!r}: expected one of {', '.join(BASES)}")
    return BASES[size]()


def get_config(choice: str = "baseline") -> ml_collections.ConfigDict:
    row, _, size = choice.partition(",")
    of = base(size or "3b-published")
    names = [one.name for one in TABLES[TABLE].rows]
    if row not in names:
        raise ValueError(f"row {row!r}: expected one of {', '.join(names)}")
    return to_config_dict(TABLES[TABLE][row].change(of.run, of.kit))
