"""Systems of sizes drawn at random, each from a folder that transformers saved: logits, and the way back."""

import numpy as np
import pytest
import torch
from folders import asked, exported_again, load, logits, picture, verbatim
from test_idefics import idefics_folder, listed
from test_idefics2 import idefics2
from test_llava import llava, llava_next
from test_paligemma import paligemma
from torch_helpers import compare, rounding
from transformers import Dinov2Config, LlamaConfig, MistralConfig, SiglipVisionConfig

SEEDS = range(3)
pytestmark = pytest.mark.thorough
TEXT = "USER: <image><image> two dogs? ASSISTANT: yes USER: and <image>? ASSISTANT:"


class Draw:
    def __init__(self, *seed: int) -> None:
        self.rng = np.random.default_rng(seed)

    def __call__(self, *choices):
        return choices[self.rng.integers(len(choices))]

    def text(self) -> dict:
        kv_heads, group, head_width = self(1, 2, 3), self(1, 2, 3), self(4, 6, 10)
        return dict(
            hidden_size=kv_heads * group * head_width,
            intermediate_size=self(17, 24, 40),
            num_hidden_layers=self(1, 2, 4),
            num_attention_heads=kv_heads * group,
            num_key_value_heads=kv_heads,
            head_dim=self(head_width, 8, 14),
        )

    def tower(self) -> dict:
        heads = self(1, 2, 3, 5)
        return dict(
            num_attention_heads=heads,
            hidden_size=heads * self(6, 8, 14),
            intermediate_size=self(20, 33, 64),
            num_hidden_layers=self(2, 3),
            patch_size=self(4, 8),
            hidden_act=self("gelu", "quick_gelu", "gelu_pytorch_tanh", "relu"),
        )


def three() -> list:
    return [picture(1, 30, 44), picture(2, 11, 60), picture(3, 70, 20)]


def draw_llava(folder, draw):
    vision = draw(None, SiglipVisionConfig, Dinov2Config)
    choices = dict(vision_feature_layer=draw(-1, -2, 1, [-1, 0]), tie_word_embeddings=draw(False, True))
    choices["vision_feature_select_strategy"] = "full" if vision is SiglipVisionConfig else draw("full", "default")
    choices |= dict(projector_hidden_act=draw("gelu", "relu"), multimodal_projector_bias=draw(False, True))
    text = draw(LlamaConfig, MistralConfig)
    choices |= dict(vision=vision) if vision else {}
    model, processor = llava(folder, text, sizes=draw.text(), tower=draw.tower(), **choices)
    return model, asked(processor, [TEXT], three()), (TEXT, three())


def draw_llava_next(folder, draw):
    choices = dict(vision_feature_layer=draw(-1, -2), tie_word_embeddings=draw(False, True))
    text = draw(LlamaConfig, MistralConfig)
    model, processor = llava_next(folder, text, sizes=draw.text(), tower=draw.tower(), **choices)
    return model, asked(processor, [TEXT], three()), (TEXT, three())


def draw_idefics(folder, draw):
    heads, width, interval = draw(1, 3, 4), draw(6, 10), draw(1, 2, 3)
    tower = draw.tower()
    tower["embed_dim"] = tower.pop("hidden_size")
    normed = draw(False, True)
    perceiver = dict(
        use_resampler=True,
        resampler_depth=draw(1, 3),
        resampler_n_heads=draw(1, 3),
        resampler_head_dim=draw(6, 10),
        resampler_n_latents=draw(2, 7),
        qk_layer_norms_perceiver=normed,
    )
    changes = dict(
        hidden_size=heads * width,
        intermediate_size=draw(17, 40),
        num_hidden_layers=interval * draw(1, 2, 3),
        num_attention_heads=heads,
        cross_layer_interval=interval,
        qk_layer_norms=normed,
        tie_word_embeddings=draw(False, True),
        vision_config=tower | dict(image_size=16),
        perceiver_config=perceiver,
    )
    text = "a cat <image><image> two dogs run <image> in the park"
    model, processor = idefics_folder(folder, **changes)
    return model, processor(text=[listed(text, three())]), (text, three())


def draw_paligemma(folder, draw):
    text = draw.text()
    text["head_dim"] = draw(4, 8, 14)
    tower = draw.tower() | dict(patch_size=4)
    model, processor = paligemma(folder, text=text, vision=tower, tie_word_embeddings=draw(False, True))
    prompt = ("<image><image><image>two dogs run in the park", three())
    inputs = processor(images=prompt[1], text=prompt[0], return_tensors="pt")
    inputs.pop("labels")
    return model, inputs, prompt


def draw_idefics2(folder, draw):
    tower = draw.tower() | dict(patch_size=4, image_size=draw(16, 24, 40))
    kv_heads = draw(1, 2, 3)
    perceiver = dict(
        resampler_n_latents=draw(2, 5),
        resampler_depth=draw(1, 3),
        resampler_n_heads=kv_heads * draw(1, 2),
        resampler_head_dim=draw(4, 10),
        num_key_value_heads=kv_heads,
        hidden_act=draw("silu", "gelu"),
    )
    choices = dict(split=draw(False, True), sides=draw((8, 30), (12, 50)), tie_word_embeddings=draw(False, True))
    model, processor = idefics2(folder, text=draw.text(), vision=tower, perceiver=perceiver, **choices)
    text = "a cat <image><image> two dogs run <image> in the park"
    return model, processor(images=[three()], text=[text], return_tensors="pt"), (text, three())


FAMILIES = {
    "idefics2": draw_idefics2,
    "llava": draw_llava,
    "llava_next": draw_llava_next,
    "idefics": draw_idefics,
    "paligemma": draw_paligemma,
}


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_back(tmp_path, family, seed):
    model, inputs, prompt = FAMILIES[family](tmp_path / "a", Draw(seed, len(family)))
    vlm = load(tmp_path / "a")
    ours = logits(vlm, verbatim(vlm, *prompt))
    with torch.no_grad():
        theirs = model(**inputs).logits[0]
        compare(ours, theirs, rounding(theirs))
        again = exported_again(vlm, tmp_path / "a", type(model), tmp_path / "b")
        compare(ours, again(**inputs).logits[0], rounding(theirs))
