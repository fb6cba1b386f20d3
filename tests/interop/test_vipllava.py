"""ViP-LLaVA against transformers: features of several layers, joined and normalised."""

import json

import jax
import numpy as np
import pytest
import torch
from folders import (
    CHAT,
    IMAGE,
    asked,
    exported_again,
    laid_out,
    load,
    logits,
    picture,
    saved,
    their_answer,
    tokenizer,
    verbatim,
)
from safetensors.numpy import load_file, save_file
from test_llava import SIDE, SIZES, TEXT, TWO, VISION, class_and_registers
from torch_helpers import compare
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    Dinov2WithRegistersConfig,
    LlamaConfig,
    LlavaProcessor,
    SiglipVisionConfig,
    VipLlavaConfig,
    VipLlavaForConditionalGeneration,
)


def vipllava(folder, vision=CLIPVisionConfig, seed=0, tower=None, **changes):
    """(the torch model, its processor), saved in the folder."""
    words = tokenizer()
    config = VipLlavaConfig(
        vision_config=vision(**VISION | (tower or {})),
        text_config=LlamaConfig(**SIZES, vocab_size=len(words)),
        **dict(image_token_index=IMAGE, vision_feature_layer=[-2, -3, 1]) | changes,
    )
    processor = LlavaProcessor(
        image_processor=CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}),
        tokenizer=words,
        patch_size=config.vision_config.patch_size,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=class_and_registers(config.vision_config),
        chat_template=CHAT,
    )
    return saved(folder, VipLlavaForConditionalGeneration(config), processor, seed), processor


@pytest.mark.parametrize(
    "changes",
    [
        dict(),
        dict(vision_feature_layer=-1, projector_layernorm_eps=0.1, projector_hidden_act="relu", tie_word_embeddings=True),
        dict(vision=Dinov2WithRegistersConfig, tower=dict(num_register_tokens=2, image_size=28)),
    ],
    ids=["clip", "one_layer", "registers"],
)
def test_logits_answers_and_back(tmp_path, changes):
    model, processor = vipllava(tmp_path / "a", seed=3, **changes)
    vlm = load(tmp_path / "a")
    many = [(TEXT, [picture(1, 30, 44)]), (TWO, [picture(n, 20 + n, 40) for n in range(3)])]
    requests = [verbatim(vlm, *one) for one in many]
    inputs = [asked(processor, [text], pictures) for text, pictures in many]
    assert laid_out(vlm, requests[1]).tokens.tolist() == inputs[1]["input_ids"][0].tolist()
    ours = logits(vlm, requests[1])
    with torch.no_grad():
        compare(ours, model(**inputs[1]).logits[0])
        again = exported_again(vlm, tmp_path / "a", VipLlavaForConditionalGeneration, tmp_path / "b")
        compare(ours, again(**inputs[1]).logits[0])
    answers = [answer.tokens for answer in vlm.answer(requests, max_new_tokens=12)]
    assert answers == [their_answer(model, one, 12)[0] for one in inputs] and answers[0] != answers[1]


def test_older_configs_and_the_authors_names(tmp_path):
    vipllava(tmp_path)
    before = load(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["vision_feature_layers"] = config.pop("vision_feature_layer")
    (tmp_path / "config.json").write_text(json.dumps(config))
    file = tmp_path / "model.safetensors"
    authors = {
        "multi_modal_projector.projector_layernorm.": "model.mm_projector.clip_layernorm.",
        "multi_modal_projector.linear_1.": "model.mm_projector.final_linear.0.",
        "multi_modal_projector.linear_2.": "model.mm_projector.final_linear.2.",
    }
    state = load_file(file)
    for theirs, own in authors.items():
        found = [name for name in state if theirs in name]
        assert found
        for name in found:
            state[own + name.rpartition(".")[2]] = state.pop(name)
    save_file(state, file)
    after = load(tmp_path)
    assert after.model.config == before.model.config
    jax.tree.map(np.testing.assert_array_equal, after.params, before.params)


def test_a_tower_without_a_class_token_is_refused(tmp_path):
    """transformers drops its first patch."""
    vipllava(tmp_path, vision=SiglipVisionConfig)
    with pytest.raises(ValueError, match=r"ViP-LLaVA always drops it.*'siglip_vision_model' here has no class token"):
        load(tmp_path)
