"""LLaVA around other parts against transformers: DINOv2, features of several layers, OPT; and what does not go together."""

import json

import pytest
import torch
from folders import asked, load, picture, their_answer, verbatim
from test_llava import FULL, TEXT, TWO, compare_logits_and_back, llava, llava_next
from transformers import Dinov2Config, Dinov2WithRegistersConfig, OPTConfig, SiglipVisionConfig

OPT_SIZES = dict(ffn_dim=56, word_embed_proj_dim=32, tie_word_embeddings=False)


@pytest.mark.parametrize(
    "changes",
    [
        dict(vision=SiglipVisionConfig, vision_feature_select_strategy="full", tower=dict(vision_use_head=False)),
        dict(vision_feature_layer=[-2, 1]),
        dict(vision_feature_layer=[3, 0, -1, -2], vision_feature_select_strategy="full"),
        dict(vision=Dinov2Config),
        # Positions for pictures of 28 pixels, and a picture processor that gives 16.
        dict(vision=Dinov2Config, tower=dict(image_size=28), vision_feature_layer=[-1, -2], **FULL),
        dict(vision=Dinov2WithRegistersConfig, tower=dict(num_register_tokens=2, image_size=28)),
        dict(vision=Dinov2WithRegistersConfig, tower=dict(num_register_tokens=2), vision_feature_layer=-1, **FULL),
        dict(vision=Dinov2WithRegistersConfig, tower=dict(num_register_tokens=0)),
        dict(text=OPTConfig, sizes=OPT_SIZES),
        dict(text=OPTConfig, sizes=OPT_SIZES | dict(do_layer_norm_before=False)),
    ],
    ids=[
        "siglip_no_head",
        "two_layers",
        "four_layers_full",
        "dinov2",
        "dinov2_resized_full",
        "registers_resized",
        "registers_full",
        "no_registers",
        "opt",
        "opt_norms_behind",
    ],
)
def test_logits_and_back(tmp_path, changes):
    compare_logits_and_back(tmp_path, changes)


@pytest.mark.parametrize(
    "changes, features",
    [
        (FULL, "1 feature of 'clip_vision_model'"),
        (dict(vision=Dinov2WithRegistersConfig, tower=dict(num_register_tokens=2)), "2 features of 'dinov2_with_registers'"),
    ],
    ids=["class_token", "registers"],
)
def test_next_refuses_features_that_no_tile_has_a_place_for(tmp_path, changes, features):
    model, processor = llava_next(tmp_path, **changes)
    with pytest.raises(RuntimeError), torch.no_grad():
        model(**asked(processor, [TEXT], [picture(1, 30, 44)]))
    with pytest.raises(ValueError, match=rf"config\.json: vision_feature_select_strategy=.* leaves {features}"):
        load(tmp_path)


def test_what_no_projector_can_read_is_refused(tmp_path):
    llava(tmp_path / "none", vision_feature_layer=[-1])
    file = tmp_path / "none" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"vision_feature_layer": []}))
    with pytest.raises(ValueError, match=r"vision_feature_layer=\[\] \(expected a whole number .* or a list of 1 to"):
        load(tmp_path / "none")
    llava(tmp_path / "narrow", text=OPTConfig, sizes=OPT_SIZES | dict(word_embed_proj_dim=16))
    with pytest.raises(ValueError, match="embeddings of width 16 in a model of width 32"):
        load(tmp_path / "narrow")
    llava(tmp_path / "first", vision=SiglipVisionConfig)
    with pytest.raises(ValueError, match="the 'siglip_vision_model' here has no class token"):
        load(tmp_path / "first")


@pytest.mark.parametrize(
    "changes",
    [
        dict(vision=Dinov2WithRegistersConfig, tower=dict(num_register_tokens=2, image_size=28), vision_feature_layer=[-1, 1]),
        dict(text=OPTConfig, sizes=OPT_SIZES),
    ],
    ids=["registers_joined", "opt"],
)
def test_answers_of_other_parts(tmp_path, changes):
    model, processor = llava(tmp_path, seed=3, **changes)
    vlm = load(tmp_path)
    many = [(TEXT, [picture(1, 30, 44)]), (TWO, [picture(n, 20 + n, 40) for n in range(3)])]
    expected = [their_answer(model, asked(processor, [text], pictures), 12)[0] for text, pictures in many]
    answers = vlm.answer([verbatim(vlm, *one) for one in many], max_new_tokens=12)
    assert [answer.tokens for answer in answers] == expected and expected[0] != expected[1]
