"""Published language models have as many parameters here as in transformers, from shapes alone."""

import math

import jax
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    GemmaConfig,
    GPTNeoXConfig,
    LlamaConfig,
    MixtralConfig,
    MptConfig,
    OPTConfig,
    Qwen2Config,
)

from vlm_jax.config import ModelConfig
from vlm_jax.interop import gemma, gpt_neox, llama, mixtral, mpt, opt, qwen2
from vlm_jax.interop.engine import abstract_params
from vlm_jax.interop.plan import Problems, resolve
from vlm_jax.models.vlm import VisionLanguageModel
from vlm_jax.training.params import by_path


def sizes(width: int, layers: int, heads: int, hidden: int, vocab: int, **others) -> dict:
    return dict(
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=hidden,
        vocab_size=vocab,
        **others,
    )


PUBLISHED = {
    "vicuna-7b": (6_738_415_616, llama, LlamaConfig(**sizes(4096, 32, 32, 11_008, 32_000))),
    "llama-3-8b": (8_030_261_248, llama, LlamaConfig(**sizes(4096, 32, 32, 14_336, 128_256, num_key_value_heads=8))),
    "mixtral-8x7b": (46_702_792_704, mixtral, MixtralConfig(**sizes(4096, 32, 32, 14_336, 32_000, num_key_value_heads=8))),
    "qwen2-7b": (7_615_616_512, qwen2, Qwen2Config(**sizes(3584, 28, 28, 18_944, 152_064, num_key_value_heads=4))),
    "qwen2-0.5b": (
        494_032_768,
        qwen2,
        Qwen2Config(**sizes(896, 24, 14, 4864, 151_936, num_key_value_heads=2, tie_word_embeddings=True)),
    ),
    "pythia-2.8b": (2_775_208_960, gpt_neox, GPTNeoXConfig(**sizes(2560, 32, 32, 10_240, 50_304))),
    "redpajama-3b": (
        2_775_864_320,
        gpt_neox,
        GPTNeoXConfig(**sizes(2560, 32, 32, 10_240, 50_432), use_parallel_residual=False, rotary_pct=1.0),
    ),
    "gemma-2b": (2_506_172_416, gemma, GemmaConfig(**sizes(2048, 18, 8, 16_384, 256_000, num_key_value_heads=1))),
    "opt-125m": (125_239_296, opt, OPTConfig()),
    "mpt-7b": (6_649_286_656, mpt, MptConfig(d_model=4096, n_heads=32, n_layers=32, vocab_size=50_432, no_bias=True)),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters(name):
    published, family, config = PUBLISHED[name]
    with torch.device("meta"):
        oracle = AutoModelForCausalLM.from_config(config)
    assert sum(parameter.numel() for parameter in oracle.parameters()) == published
    ours = family.config_from_hf(config)
    model = VisionLanguageModel(ModelConfig(vision=None, connector=None, fusion=None, language=ours))
    params = abstract_params(model)["language"]
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params)) == published
    problems = Problems()
    resolve(family.table(ours), {path: leaf.shape for path, leaf in by_path(params).items()}, problems)
    problems.check()
