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
    [
        dict(),
        dict(tie_word_embeddings=False, activation_function="gelu"),
        dict(enable_bias=False),
        dict(do_layer_norm_before=False, word_embed_proj_dim=16),
        dict(do_layer_norm_before=False, tie_word_embeddings=False),
        dict(word_embed_proj_dim=40, tie_word_embeddings=False),
        dict(_remove_final_layer_norm=True),
    ],
    ids=["relu", "untied_gelu", "no_bias", "350m", "norms_behind", "projected", "no_last_norm"],
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


def test_norms_without_numbers_are_refused():
    with pytest.raises(ValueError, match=r"layer_norm_elementwise_affine=False \(only True is implemented\)"):
        opt.config_from_hf(OPTConfig(**SIZES, layer_norm_elementwise_affine=False))
