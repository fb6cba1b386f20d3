"""MPT-1B (`mosaic_gpt`) against a torch reference, logit by logit; in OpenFlamingo see `test_openflamingo.py`."""

import json
import math
from types import SimpleNamespace

import jax
import numpy as np
import pytest
import torch
from folders import laid_out, load, logits, tokenizer, verbatim
from mosaic_gpt_reference import HUB, MosaicGpt
from safetensors.numpy import load_file
from torch_helpers import compare, randomised, state_of

from vlm_jax.config import ModelConfig
from vlm_jax.families import mosaic_gpt
from vlm_jax.interop.engine import abstract_params
from vlm_jax.models.sizes import language
from vlm_jax.models.vlm import VisionLanguageModel

TEXT, NEW = "two dogs run in the", 8


@pytest.mark.parametrize(
    "changes, mesh",
    [
        (dict(), "tensor=2"),
        (dict(n_heads=2, n_layers=2, mlp_ratio=3, attn_qk_ln=False, alibi_bias_max=4), None),
    ],
    ids=["mpt_1b", "without_norms_of_queries"],
)
def test_logits_answers_and_back(tmp_path, changes, mesh):
    words = tokenizer()
    model = randomised(MosaicGpt(len(words) + 3, **changes))
    model.save_pretrained(tmp_path / "hub")
    words.save_pretrained(tmp_path / "hub")
    with pytest.raises(ValueError, match=r"holds its weights in pytorch_model.bin only, a pickle. Allow it with"):
        load(tmp_path / "hub")
    vlm = load(tmp_path / "hub", mesh, pickles=True)
    request = verbatim(vlm, TEXT)
    ids = laid_out(vlm, request).tokens.tolist()
    assert ids == words(TEXT)["input_ids"]
    with torch.no_grad():
        compare(logits(vlm, request), model(torch.tensor([ids])).logits[0])
        expected = list(ids)
        for _ in range(NEW):
            expected.append(int(model(torch.tensor([expected])).logits[0, -1].argmax()))
    answer = vlm.answer([request], max_new_tokens=NEW)[0].tokens
    assert answer == expected[len(ids) :][: len(answer)] and answer

    vlm.checkpoint.export(vlm.params, tmp_path / "back")
    assert json.loads((tmp_path / "back" / "config.json").read_text()) == model.settings
    back, state = load_file(tmp_path / "back" / "model.safetensors"), state_of(model)
    assert back.keys() == state.keys()
    for name, tensor in state.items():
        np.testing.assert_array_equal(back[name], tensor, err_msg=name)


def test_the_published_size():
    model = VisionLanguageModel(ModelConfig(vision=None, connector=None, fusion=None, language=language("mpt-1b")))
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(abstract_params(model))) == 1_311_311_872


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(alibi=False), r"MosaicGptConfig: alibi=False \(only True is implemented\)"),
        (dict(no_bias=False), "no_bias=False"),
        (dict(attn_clip_qkv=8.0), "attn_clip_qkv=8.0"),
        (dict(softmax_scale=0.1), "softmax_scale=0.1"),
        (dict(prefix_lm=True), "prefix_lm=True"),
        (dict(logit_scale="inv_sqrt_d_model"), "logit_scale='inv_sqrt_d_model'"),
        (dict(n_heads=12, d_model=96), "n_heads=12, d_model=96; only a power of two that divides d_model"),
        (dict(n_heads=4, d_model=90), "n_heads=4, d_model=90"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        mosaic_gpt.config_from_hf(SimpleNamespace(**HUB | changes))


def test_what_a_file_leaves_out_is_the_hubs_default():
    said = {name: value for name, value in HUB.items() if name in ("model_type", "no_bias", "attn_qk_ln")}
    with pytest.raises(ValueError, match="alibi=False"):
        mosaic_gpt.config_from_hf(SimpleNamespace(**said))
    assert mosaic_gpt.config_from_hf(SimpleNamespace(**said, alibi=True)) == language("mpt-1b")
