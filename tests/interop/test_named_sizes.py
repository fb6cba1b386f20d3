"""Sizes by name are those of the published configurations, to the last setting."""

from types import SimpleNamespace

import pytest
from mosaic_gpt_reference import HUB
from test_published_sizes import CLIP_L, MISTRAL_7B, SO400M, VICUNA_7B, VICUNA_13B, idefics, llava, sizes
from test_published_sizes import MISTRAL as LLAVA_MISTRAL
from test_published_sizes import SYSTEMS as PUBLISHED_SYSTEMS
from transformers import (
    CLIPVisionConfig,
    GemmaConfig,
    GPTNeoXConfig,
    Idefics2Config,
    LlamaConfig,
    LlavaConfig,
    LlavaNextConfig,
    MistralConfig,
    MixtralConfig,
    MptConfig,
    OPTConfig,
    PhiConfig,
    SiglipVisionConfig,
    StableLmConfig,
)

from vlm_jax.config.register import RegisterError
from vlm_jax.families import clip, gemma, gpt_neox, llama, mixtral, mosaic_gpt, mpt, opt, phi, siglip, stablelm
from vlm_jax.interop.register import FAMILIES
from vlm_jax.models.sizes import LANGUAGE, VISION, language, vision
from vlm_jax.models.systems import system

rope = lambda base, share=1.0: dict(
    rope_parameters=dict(rope_type="default", rope_theta=base, partial_rotary_factor=share)
)  # the hub's files say it so or as `rope_theta`
opt_of = lambda width, layers, heads, outer=None, **changes: OPTConfig(
    hidden_size=width,
    word_embed_proj_dim=outer or width,
    num_hidden_layers=layers,
    num_attention_heads=heads,
    ffn_dim=4 * width,
    **changes,
)
MISTRAL = sizes(4096, 32, 32, 14_336, 32_000, num_key_value_heads=8)
LANGUAGES = {
    "vicuna-7b": (
        llama,
        LlamaConfig(**sizes(4096, 32, 32, 11_008, 32_000), max_position_embeddings=4096, rms_norm_eps=1e-5),
    ),
    "vicuna-13b": (
        llama,
        LlamaConfig(**sizes(5120, 40, 40, 13_824, 32_000), max_position_embeddings=4096, rms_norm_eps=1e-5),
    ),
    "llama-7b": (llama, LlamaConfig(**sizes(4096, 32, 32, 11_008, 32_000))),
    "llama-65b": (llama, LlamaConfig(**sizes(8192, 80, 64, 22_016, 32_000))),
    "yi-34b": (
        llama,
        LlamaConfig(
            **sizes(7168, 60, 56, 20_480, 64_000, num_key_value_heads=8),
            **rope(5_000_000.0),
            max_position_embeddings=4096,
            rms_norm_eps=1e-5,
        ),
    ),
    "llama-3-8b": (
        llama,
        LlamaConfig(
            **sizes(4096, 32, 32, 14_336, 128_256, num_key_value_heads=8),
            **rope(500_000.0),
            max_position_embeddings=8192,
            rms_norm_eps=1e-5,
        ),
    ),
    "mistral-7b": (
        llama,
        MistralConfig(**MISTRAL, max_position_embeddings=32_768, rms_norm_eps=1e-5, sliding_window=4096, **rope(10_000.0)),
    ),
    "mixtral-8x7b": (
        mixtral,
        MixtralConfig(**MISTRAL, max_position_embeddings=32_768, rms_norm_eps=1e-5, sliding_window=None, **rope(1_000_000.0)),
    ),
    "gemma-2b": (gemma, GemmaConfig(**sizes(2048, 18, 8, 16_384, 256_000, num_key_value_heads=1))),
    "opt-125m": (opt, OPTConfig()),
    "opt-350m": (opt, opt_of(1024, 24, 16, outer=512, do_layer_norm_before=False)),
    "opt-1.3b": (opt, opt_of(2048, 24, 32)),
    "opt-2.7b": (opt, opt_of(2560, 32, 32)),
    "opt-6.7b": (opt, opt_of(4096, 32, 32)),
    "mpt-1b": (mosaic_gpt, SimpleNamespace(**HUB)),
    "mpt-7b": (mpt, MptConfig(d_model=4096, n_heads=32, n_layers=32, vocab_size=50_432, no_bias=True)),
    "pythia-2.8b": (gpt_neox, GPTNeoXConfig(**sizes(2560, 32, 32, 10_240, 50_304), **rope(10_000.0, 0.25))),
    "redpajama-3b": (
        gpt_neox,
        GPTNeoXConfig(**sizes(2560, 32, 32, 10_240, 50_432), use_parallel_residual=False, **rope(10_000.0)),
    ),
    "phi-2": (phi, PhiConfig(**sizes(2560, 32, 32, 10_240, 51_200), **rope(10_000.0, 0.4))),
    "stablelm-1.6b": (
        stablelm,
        StableLmConfig(**sizes(2048, 24, 32, 5632, 100_352, num_key_value_heads=32), use_qkv_bias=True, **rope(10_000.0, 0.25)),
    ),
}
CLIP_H = dict(
    hidden_size=1280, intermediate_size=5120, num_hidden_layers=32, num_attention_heads=16, patch_size=14, hidden_act="gelu"
)
OF_OURS = {"nfnet-f0", "nfnet-f6", "chinchilla-1.4b", "chinchilla-7b", "chinchilla-70b"}  # transformers has none of them
clip_of = lambda **sizes: clip.image_config_from_hf(CLIPVisionConfig(**sizes)).encoder
siglip_of = lambda **sizes: siglip.image_config_from_hf(SiglipVisionConfig(**sizes)).encoder
VISIONS = {
    "clip-b/32": clip_of(),
    "clip-l/14": clip_of(**CLIP_L | dict(image_size=224)),
    "clip-l/14-336": clip_of(**CLIP_L),
    "clip-h/14": clip_of(**CLIP_H),
    "siglip-b/16": siglip_of(),
    "siglip-so400m/14": siglip_of(**SO400M, image_size=224, patch_size=14),
    "siglip-so400m/14-384": siglip_of(**SO400M, image_size=384, patch_size=14),
    "siglip-so400m/14-980": siglip_of(**SO400M, image_size=980, patch_size=14),
}


@pytest.mark.parametrize("name", LANGUAGES)
def test_language_models(name):
    family, published = LANGUAGES[name]
    assert language(name) == family.config_from_hf(published)


@pytest.mark.parametrize("name", VISIONS)
def test_vision_encoders(name):
    assert vision(name) == VISIONS[name]


def test_every_name_is_compared_and_an_unknown_one_is_refused():
    assert set(LANGUAGE) | set(VISION) == set(LANGUAGES) | set(VISIONS) | OF_OURS
    with pytest.raises(RegisterError, match=r"the size 'vicuna-8b' is not known: expected one of .*'vicuna-7b'"):
        language("vicuna-8b")


LLAMA = dict(max_position_embeddings=4096, rms_norm_eps=1e-5)
SYSTEMS = {
    "llava-1.5-7b": llava(LlavaConfig, LlamaConfig(**VICUNA_7B, **LLAMA)),
    "llava-1.5-13b": llava(LlavaConfig, LlamaConfig(**VICUNA_13B, **LLAMA)),
    "bakllava-7b": llava(LlavaConfig, MistralConfig(**LLAVA_MISTRAL, **LLAMA | dict(max_position_embeddings=32_768))),
    "llava-next-vicuna-7b": llava(LlavaNextConfig, LlamaConfig(**VICUNA_7B, **LLAMA)),
    "llava-next-vicuna-13b": llava(LlavaNextConfig, LlamaConfig(**VICUNA_13B, **LLAMA)),
    "llava-next-34b": llava(
        LlavaNextConfig,
        LlamaConfig(**sizes(7168, 60, 56, 20_480, 64_064, num_key_value_heads=8), **LLAMA, **rope(5_000_000.0)),
    ),
    "idefics-9b": PUBLISHED_SYSTEMS["idefics-9b"][1],
    "idefics-80b": idefics(hidden_size=8192, intermediate_size=22_016, num_hidden_layers=80, num_attention_heads=64),
    "idefics2-8b": Idefics2Config(
        text_config=MistralConfig(**MISTRAL_7B, **LLAMA | dict(max_position_embeddings=32_768)),
        vision_config=SO400M | dict(image_size=980, patch_size=14),
        perceiver_config={},
    ),
    "paligemma-3b": PUBLISHED_SYSTEMS["paligemma-3b-pt-224"][1],
}


@pytest.mark.parametrize("name", SYSTEMS)
def test_systems_by_name_are_the_published_ones(name):
    hf_config = SYSTEMS[name]
    assert system(name) == FAMILIES[hf_config.model_type].config_from_hf(hf_config)
