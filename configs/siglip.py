"""SigLIP (Zhai et al. 2023) from nothing, on pairs of pictures and captions: each pair is a question of its own.

    python train.py --config=configs/siglip.py:b16 --workdir=runs/siglip-b16 \\
        --config.data.source.train=pairs.json --config.data.source.eval=held_out.json --config.mesh.fsdp=8

`:b16` (B/16 at 224 pixels) or `:so400m` (SoViT-400M/14 at 384). The data are as in `clip.py`.

Published: the sigmoid loss with scale 10 and bias -10 at first, beta2 0.95, a batch of 32,768 (beyond which more stops
helping), texts of 64 tokens with their padding read, as in the released checkpoints. Rate 1e-3, decay 0.01, cosine after 3 %
of warm-up and clipping at 1 are those of the authors' own small example (big_vision, `siglip_lit_coco.py`). The number of steps
is our choice: 9 billion pairs seen. WebLI, the authors' set, is not public.
"""

import ml_collections

from vlm_jax.config import ContrastiveConfig, DataConfig, JsonLinesConfig, OptimizerConfig, RetrievalConfig, RunConfig
from vlm_jax.config_dict import to_config_dict
from vlm_jax.models.towers import two_towers

PAIRS, BATCH = 9_000_000_000, 32_768
SIZES = {
    "b16": ("siglip-b/16", "google/siglip-base-patch16-224"),
    "so400m": ("siglip-so400m/14-384", "google/siglip-so400m-patch14-384"),
}


def get_config(size: str = "b16") -> ml_collections.ConfigDict:
    if size not in SIZES:
        raise ValueError(f"name a size behind a colon: --config=configs/siglip.py:b16; there are {', '.join(SIZES)}")
    name, processor = SIZES[size]
    model, steps = two_towers(name), PAIRS // BATCH
    data = DataConfig(
        source=JsonLinesConfig(train="", eval=""),
        layout="pair",
        processor=processor,
        image_size=model.vision.image_size,
        rows=BATCH,
        tokens=64,
        images=1,
        too_long="truncate",
        workers=8,
    )
    run = RunConfig(
        model=model,
        data=data,
        objective=ContrastiveConfig(max_scale=None, exchange="ring"),
        optimizer=OptimizerConfig(lr=1e-3, warmup_steps=round(0.03 * steps), b2=0.95, weight_decay=0.01, clip_norm=1.0),
        steps=steps,
        remat="full",
        eval_every=5000,
        save_every=5000,
        evaluators=(RetrievalConfig(every=5000),),
    )
    return to_config_dict(run)
