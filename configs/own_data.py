"""The Flamingo of `flamingo_easyvqa.py` on your own data: JSON lines as in `vlm_jax/data/sources/jsonl.py`.

    python train.py --config=configs/own_data.py --workdir=runs/mine \
        --config.data.source.train=mine/train.jsonl --config.data.source.eval=mine/eval.jsonl
"""

import ml_collections

from configs import flamingo_easyvqa
from vlm_jax.config import JsonLinesConfig
from vlm_jax.config_dict import to_config_dict


def get_config() -> ml_collections.ConfigDict:
    config = flamingo_easyvqa.get_config().unlock()
    config.data.source = to_config_dict(JsonLinesConfig(train="", eval=""))
    config.data.sampling = ()
    return config.lock()
