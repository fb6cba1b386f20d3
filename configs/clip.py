"""CLIP (Radford et al. 2021) from nothing, on pairs of pictures and captions.

    python train.py --config=configs/clip.py:b32 --workdir=runs/clip-b32 \\
        --config.data.source.train=pairs.json --config.data.source.eval=held_out.json --config.mesh.fsdp=8

`:b32` (ViT-B/32), `:l14` (ViT-L/14), or `:l14-336`, which goes on from a run of the second with pictures of 336 pixels for one
epoch: --config.init_from=runs/clip-l14. The data are LLaVA's form or any of `data/sources/jsonl.py`; an answer is a caption.

Published (section 2.5, appendix F): 400 million pairs, 32,768 a batch, 32 epochs, AdamW with decay 0.2 of all but gains and
biases, beta2 0.98 and eps 1e-6, 2,000 steps of warm-up, cosine, rate 5e-4 (B/32) and 4e-4 (L/14; 2e-5 for the epoch at 336
pixels), temperature 0.07 at first, the scale clipped at 100. Theirs is a random square of each picture, ours its middle; they
initialise the layers more narrowly.

A batch that does not fit: --config.optimizer.accumulate=32 runs the towers on 32 micro-batches, and the loss stays one over all
32,768 pairs. --config.objective.exchange=ring never holds more logits than one device's rows among another's.
"""

import ml_collections

from vlm_jax.config import (
    ContrastiveConfig,
    DataConfig,
    JsonLinesConfig,
    OptimizerConfig,
    ParamRule,
    RetrievalConfig,
    RunConfig,
)
from vlm_jax.config_dict import to_config_dict
from vlm_jax.models.towers import two_towers

PAIRS, BATCH = 400_000_000, 32_768
NO_CLIPPING = 1e9
# The towers, the checkpoint whose tokenizer and picture processor are used, rate, epochs.
SIZES = {
    "b32": ("clip-b/32", "openai/clip-vit-base-patch32", 5e-4, 32),
    "l14": ("clip-l/14", "openai/clip-vit-large-patch14", 4e-4, 32),
    "l14-336": ("clip-l/14-336", "openai/clip-vit-large-patch14-336", 2e-5, 1),
}
UNDECAYED = ParamRule(pattern="(scale|bias)$", decay=0.0)  # gains, biases, and the scale of the logits


def get_config(size: str = "b32") -> ml_collections.ConfigDict:
    if size not in SIZES:
        raise ValueError(f"name a size behind a colon: --config=configs/clip.py:b32; there are {', '.join(SIZES)}")
    name, processor, rate, epochs = SIZES[size]
    model = two_towers(name)
    data = DataConfig(
        source=JsonLinesConfig(train="", eval=""),
        layout="pair",
        processor=processor,
        image_size=model.vision.image_size,
        rows=BATCH,
        tokens=77,
        images=1,
        too_long="truncate",
        workers=8,
    )
    optimizer = OptimizerConfig(
        lr=rate, warmup_steps=2000, b2=0.98, eps=1e-6, weight_decay=0.2, clip_norm=NO_CLIPPING, rules=(UNDECAYED,)
    )
    run = RunConfig(
        model=model,
        data=data,
        objective=ContrastiveConfig(),
        optimizer=optimizer,
        steps=PAIRS * epochs // BATCH,
        remat="full",
        eval_every=5000,
        save_every=5000,
        evaluators=(RetrievalConfig(every=5000),),
    )
    return to_config_dict(run)
