"""Published models have as many parameters here as in transformers, from shapes alone."""

import math

import jax
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Blip2VisionConfig,
    CLIPConfig,
    CLIPVisionConfig,
    Dinov2Config,
    Dinov2WithRegistersConfig,
    GemmaConfig,
    GPTNeoXConfig,
    Idefics2Config,
    IdeficsConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaNextConfig,
    MistralConfig,
    MixtralConfig,
    MptConfig,
    OPTConfig,
    PaliGemmaConfig,
    PreTrainedConfig,
    Qwen2Config,
    SiglipConfig,
    SiglipVisionConfig,
)

from vlm_jax.config import ModelConfig
from vlm_jax.config.register import module_of
from vlm_jax.families import gemma, gpt_neox, llama, mixtral, mpt, opt, qwen2
from vlm_jax.interop.engine import abstract_params
from vlm_jax.interop.plan import Problems, resolve
from vlm_jax.interop.register import FAMILIES
from vlm_jax.models.vlm import VisionLanguageModel
from vlm_jax.paths import by_path


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


CLIP_L = dict(
    hidden_size=1024,
    intermediate_size=4096,
    num_hidden_layers=24,
    num_attention_heads=16,
    image_size=336,
    patch_size=14,
    projection_dim=768,
)
VICUNA_7B, VICUNA_13B = sizes(4096, 32, 32, 11_008, 32_064), sizes(5120, 40, 40, 13_824, 32_064)
MISTRAL = sizes(4096, 32, 32, 14_336, 32_064, num_key_value_heads=8)


def llava(kind: type, text: PreTrainedConfig, **changes) -> PreTrainedConfig:
    return kind(vision_config=CLIPVisionConfig(**CLIP_L), text_config=text, **changes)


def paligemma(side: int) -> PaliGemmaConfig:
    tower = dict(hidden_size=1152, intermediate_size=4304, num_hidden_layers=27, num_attention_heads=16, patch_size=14)
    text = sizes(2048, 18, 8, 16_384, 257_216, num_key_value_heads=1)
    vision = SiglipVisionConfig(**tower, image_size=side, vision_use_head=False)
    return PaliGemmaConfig(vision_config=vision, text_config=GemmaConfig(**text))


def idefics(**text) -> IdeficsConfig:
    vision = dict(embed_dim=1280, intermediate_size=5120, num_hidden_layers=32, num_attention_heads=16)
    return IdeficsConfig(
        cross_layer_interval=4,
        qk_layer_norms=True,
        additional_vocab_size=2,
        vision_config=vision,
        perceiver_config=dict(qk_layer_norms_perceiver=True),
        use_resampler=True,
        **text,
    )


SYSTEMS = {
    "llava-1.5-7b-hf": (7_063_427_072, llava(LlavaConfig, LlamaConfig(**VICUNA_7B))),
    "liuhaotian/llava-v1.5-7b": (7_062_902_784, llava(LlavaConfig, LlamaConfig(**VICUNA_7B | dict(vocab_size=32_000)))),
    "llava-1.5-13b-hf": (13_351_494_656, llava(LlavaConfig, LlamaConfig(**VICUNA_13B))),
    "liuhaotian/llava-v1.5-13b": (13_350_839_296, llava(LlavaConfig, LlamaConfig(**VICUNA_13B | dict(vocab_size=32_000)))),
    "bakLlava-v1-hf": (7_566_743_552, llava(LlavaConfig, MistralConfig(**MISTRAL))),
    "llava-v1.6-vicuna-7b-hf": (7_063_431_168, llava(LlavaNextConfig, LlamaConfig(**VICUNA_7B))),
    "llava-v1.6-vicuna-13b-hf": (13_351_499_776, llava(LlavaNextConfig, LlamaConfig(**VICUNA_13B))),
    "llava-v1.6-mistral-7b-hf": (7_566_747_648, llava(LlavaNextConfig, MistralConfig(**MISTRAL))),
    "idefics-9b": (8_929_679_632, idefics()),
    "paligemma-3b-pt-224": (2_923_466_480, paligemma(224)),
    "paligemma-3b-pt-448": (2_924_351_216, paligemma(448)),
}
CLIP_L_TEXT = dict(hidden_size=768, intermediate_size=3072, num_attention_heads=12)
SO400M = dict(hidden_size=1152, intermediate_size=4304, num_hidden_layers=27, num_attention_heads=16)
DINOV2_S = dict(hidden_size=384, num_attention_heads=6, image_size=518, patch_size=14)
DINOV2_G = dict(hidden_size=1536, num_hidden_layers=40, num_attention_heads=24, image_size=518, use_swiglu_ffn=True)


def clip_l(side: int) -> CLIPConfig:
    return CLIPConfig(vision_config=CLIP_L | dict(image_size=side), text_config=CLIP_L_TEXT, projection_dim=768)


def so400m(side: int, texts: int) -> SiglipConfig:
    text = SO400M | dict(vocab_size=32_000, max_position_embeddings=texts)
    return SiglipConfig(vision_config=SO400M | dict(image_size=side, patch_size=14), text_config=text)


MISTRAL_7B = sizes(4096, 32, 32, 14_336, 32_003, num_key_value_heads=8)
SYSTEMS |= {
    "idefics2-8b": (
        8_402_768_112,
        Idefics2Config(
            text_config=MistralConfig(**MISTRAL_7B),
            vision_config=SO400M | dict(image_size=980, patch_size=14),
            perceiver_config={},
        ),
    ),
    "clip-vit-base-patch32": (151_277_313, CLIPConfig(vision_config={}, text_config={})),
    "clip-vit-large-patch14": (427_616_513, clip_l(224)),
    "clip-vit-large-patch14-336": (427_944_193, clip_l(336)),
    "siglip-base-patch16-224": (203_155_970, SiglipConfig(vision_config={}, text_config={})),
    "siglip-so400m-patch14-384": (877_960_498, so400m(384, 64)),
    "siglip-so400m-patch14-224": (877_360_306, so400m(224, 16)),
    "blip2": (985_952_256, Blip2VisionConfig()),
    "dinov2-small": (22_056_576, Dinov2Config(**DINOV2_S)),
    "dinov2-giant": (1_136_480_768, Dinov2Config(**DINOV2_G)),
    "dinov2-with-registers-small": (22_058_112, Dinov2WithRegistersConfig(**DINOV2_S)),
}
PARTS = {
    "llava-1.5-7b-hf": {"vision": 303_507_456, "connector": 20_979_712},
    "llava-1.5-13b-hf": {"connector": 31_467_520},
    "idefics-9b": {"fusion": 1_434_519_568, "connector": 125_961_984, "vision": 630_766_080},
}


@pytest.mark.parametrize("name", SYSTEMS)
def test_systems(name):
    published, hf_config = SYSTEMS[name]
    family = FAMILIES[hf_config.model_type]
    config = family.config_from_hf(hf_config)
    params = abstract_params(module_of(config)(config))
    count = lambda tree: sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))
    assert count(params) == published
    assert {part: count(params[part]) for part in PARTS.get(name, {})} == PARTS.get(name, {})
    problems = Problems()
    resolve(family.table(config, hf_config), {path: leaf.shape for path, leaf in by_path(params).items()}, problems)
    problems.check()


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
