"""MPT against transformers, logit by logit: ALiBi for any number of heads, and a fused Wqkv."""

import pytest
from torch_helpers import VOCAB, compare_language_model, random_sizes
from transformers import MptConfig, MptForCausalLM

from vlm_jax.families import mpt


def hf_config(heads: int, **changes) -> MptConfig:
    return MptConfig(vocab_size=VOCAB, d_model=8 * heads, n_heads=heads, n_layers=3, max_seq_len=32, **changes)


@pytest.mark.parametrize(
    "heads, changes",
    [
        (4, dict()),
        (6, dict()),
        (3, dict(tie_word_embeddings=False, attn_config=dict(alibi_bias_max=4))),
        (4, dict(no_bias=False)),
    ],
    ids=["power_of_two", "six_heads", "three_heads_untied", "no_bias_false"],
)
def test_mpt(heads, changes):
    config = hf_config(heads, **changes)
    ours = mpt.config_from_hf(config)
    model = MptForCausalLM(config)
    if config.attn_config.alibi_bias_max != 8:
        # transformers builds its bias with 8 whatever the config says.
        build = model.transformer.build_mpt_alibi_tensor
        model.transformer.build_mpt_alibi_tensor = lambda heads, length, device: build(heads, length, 4, device)
    compare_language_model(model, ours, mpt.table(ours))


@pytest.mark.parametrize("seed", range(3))
def test_random_sizes(seed):
    sizes = random_sizes(seed + 60)
    heads, layers, tied = (sizes[name] for name in ("num_attention_heads", "num_hidden_layers", "tie_word_embeddings"))
    config = MptConfig(vocab_size=VOCAB, d_model=6 * heads, n_heads=heads, n_layers=layers, tie_word_embeddings=tied)
    ours = mpt.config_from_hf(config)
    compare_language_model(MptForCausalLM(config), ours, mpt.table(ours))


def test_clipped_projections_are_refused():
    with pytest.raises(ValueError, match=r"clip_qkv=8.0 \(only None is implemented\)"):
        mpt.config_from_hf(hf_config(4, attn_config=dict(clip_qkv=8.0)))
