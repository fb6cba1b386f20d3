"""OPT against transformers, logit by logit."""

import pytest
from torch_helpers import VOCAB, compare_language_model, random_sizes
from transformers import OPTConfig, OPTForCausalLM

from vlm_jax.families import opt

SIZES = dict(
    vocab_size=VOCAB,
    hidden_size=32,
    ffn_dim=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    max_position_embeddings=64,
    word_embed_proj_dim=32,
)


@pytest.mark.parametrize(
    "changes",
    [dict(), dict(tie_word_embeddings=False, activation_function="gelu"), dict(enable_bias=False)],
    ids=["relu", "untied_gelu", "no_bias"],
)
def test_opt(changes):
    config = OPTConfig(**SIZES | changes)
    ours = opt.config_from_hf(config)
    compare_language_model(OPTForCausalLM(config), ours, opt.table(ours))


@pytest.mark.parametrize("seed", range(3))
def test_random_sizes(seed):
    sizes = random_sizes(seed + 50)
    names = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "tie_word_embeddings")
    config = OPTConfig(
        **{name: sizes[name] for name in names},
        ffn_dim=sizes["intermediate_size"],
        word_embed_proj_dim=sizes["hidden_size"],
        max_position_embeddings=20,
    )
    ours = opt.config_from_hf(config)
    compare_language_model(OPTForCausalLM(config), ours, opt.table(ours))


def test_the_350m_variant_is_refused():
    config = OPTConfig(**SIZES | dict(do_layer_norm_before=False, word_embed_proj_dim=16))
    with pytest.raises(ValueError, match=r"do_layer_norm_before=False.*; word_embed_proj_dim=16 \(only 32 is implemented\)"):
        opt.config_from_hf(config)
