"""Direct preference optimisation of LLaVA-1.5-7B on RLHF-V's pairs, so that it hallucinates less (Yu et al. 2024).

    python train.py --config=configs/dpo_rlhfv.py --workdir=runs/dpo \\
        --config.data.source.train=rlhf_v.jsonl --config.data.source.eval=held_out.jsonl
    python -c "import vlm_jax; vlm_jax.export('runs/dpo', 'dpo')"

The data are RLHF-V-Dataset's 5,733 records (a question, a chosen and a rejected answer, a picture) as JSON lines, or
RLAIF-V-Dataset's, or LLaVA-RLHF's 10,000 comparisons: `vlm_jax/data/sources/jsonl.py` has the forms, which are read unchanged.

The numbers are those of the script that RLHF-V's authors published for this model (RLHF-V/RLAIF-V,
`script/train/llava15_train.sh`; RLHF-V itself trained Muffin-13B): rate 5e-7, cosine after 5 % of warm-up, decay 0.01, 2,672
updates, beta 0.1, log-probabilities summed and not averaged, pictures padded to squares, at most 2,048 tokens. It trains with
one pair a device, on four to eight devices; here an update has 8 rows. Its 2,048 tokens are an answer's with its prompt: a row
here, which takes a whole pair with 576 visual tokens in each half, has twice as many, and short pairs share a row.

The reference is a frozen copy of the projector and the language model, held in bfloat16: 14 GB over the mesh. With LoRA, as in
`llava15_train_lora.sh` (rate 1e-5), the base is the reference and nothing is copied.
"""

import ml_collections

from vlm_jax.config import DataConfig, JsonLinesConfig, OptimizerConfig, ParamRule, PreferenceConfig, RunConfig
from vlm_jax.config_dict import to_config_dict
from vlm_jax.models.systems import system

CHECKPOINT = "llava-hf/llava-1.5-7b-hf"


def get_config() -> ml_collections.ConfigDict:
    model, steps = system("llava-1.5-7b"), 2672
    data = DataConfig(
        source=JsonLinesConfig(train="", eval=""),
        pairs=True,
        processor=CHECKPOINT,
        template="vicuna_v1",
        pad_to_square=True,
        too_long="drop_turns",
        image_size=336,
        rows=8,
        tokens=4096,
        images=4,
        visual_tokens=model.visual_tokens_in_sequence,
    )
    optimizer = OptimizerConfig(
        lr=5e-7,
        warmup_steps=round(0.05 * steps),
        weight_decay=0.01,
        rules=(ParamRule(pattern="^vision", frozen=True, frozen_dtype="bfloat16"),),
    )
    run = RunConfig(
        model=model,
        data=data,
        objective=PreferenceConfig(beta=0.1, reference_dtype="bfloat16"),
        optimizer=optimizer,
        steps=steps,
        remat="full",
        init_from=CHECKPOINT,
    )
    return to_config_dict(run)
