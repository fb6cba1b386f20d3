"""Direct preference optimisation (Rafailov et al. 2023) of a model that answers easy-VQA, against its own wrong answers.

    python -m vlm_jax.evaluation.own_answers --checkpoint=runs/stage2 --source=easy_vqa --split=train \\
        --pairs=runs/own_pairs
    python train.py --config=configs/dpo_easyvqa.py:runs/stage2 --workdir=runs/dpo \\
        --config.data.source.train=runs/own_pairs/train.jsonl --config.data.source.eval=runs/own_pairs/eval.jsonl
    python -m vlm_jax.evaluation.own_answers --checkpoint=runs/stage2 --source=easy_vqa
    python -m vlm_jax.evaluation.own_answers --checkpoint=runs/dpo --source=easy_vqa

The first command asks the run its training questions and writes a pair of each wrong answer; the last two ask the test
questions before and after: accuracy, and the share of "yes" among the answers to yes/no questions. Behind the colon comes any
run that was trained on easy-VQA: model, frozen parts, tokenizer and processing are its own. `:runs/stage2,made_up` takes pairs
of all training questions in which the wrong answer is made up (yes for no, another colour), and needs no first command.

beta is the paper's 0.1. The rate is a fiftieth of that of the run before.
"""

import dataclasses
from pathlib import Path

import ml_collections

from vlm_jax.config import AugmentConfig, EasyVqaPairsConfig, JsonLinesConfig, PreferenceConfig
from vlm_jax.config_dict import to_config_dict
from vlm_jax.training.run_folder import read_config


def get_config(choice: str = "") -> ml_collections.ConfigDict:
    run, _, option = choice.partition(",")
    if not run or option not in ("", "made_up"):
        raise ValueError("name a run behind a colon: --config=configs/dpo_easyvqa.py:runs/stage2, or :runs/stage2,made_up")
    before = read_config(run)
    source = EasyVqaPairsConfig() if option else JsonLinesConfig(train="", eval="")
    data = dataclasses.replace(
        before.data,
        source=source,
        pairs=True,
        sampling=(),
        augment=AugmentConfig(),
        # A tokenizer that was trained on the run's texts is the run's: one of the pairs' texts would be another one.
        tokenizer=str(Path(run) / "tokenizer") if before.data.tokenizer == "train" else before.data.tokenizer,
    )
    optimizer = dataclasses.replace(
        before.optimizer, lr=before.optimizer.lr / 50, warmup_steps=10, schedule="cosine", decay_steps=0, weight_decay=0.0
    )
    after = dataclasses.replace(
        before,
        data=data,
        objective=PreferenceConfig(beta=0.1),
        optimizer=optimizer,
        steps=200,
        eval_every=50,
        save_every=50,
        eval_rows=0,
        evaluators=(),
        best_by="",
        init_from=run,
        init_parts=(),
    )
    return to_config_dict(after)
