"""OpenFlamingo: its modules, its checkpoint's names, and answers, with MPT and GPT-NeoX as language models."""

import dataclasses
import importlib.util
import json
import sys

import numpy as np
import pytest
import torch
from folders import laid_out, logits, picture, tokenizer, verbatim
from openflamingo_reference import Flamingo, GatedCrossAttentionBlock, PerceiverResampler
from safetensors.numpy import load_file
from torch_helpers import compare, randomised
from transformers import (
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPTextConfig,
    CLIPVisionConfig,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    MptConfig,
    MptForCausalLM,
)

import vlm_jax
from vlm_jax.config.generation import Settings

SIDE, LATENTS, DEPTH = 16, 5, 2


def mpt(vocabulary: int):
    config = MptConfig(vocab_size=vocabulary, d_model=32, n_heads=4, n_layers=4, max_seq_len=128)
    model = MptForCausalLM(config)
    return model, "transformer.blocks", model.transformer.blocks, {"transformer.wte": model.get_input_embeddings}


def neox(vocabulary: int):
    config = GPTNeoXConfig(
        vocab_size=vocabulary,
        hidden_size=32,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=56,
        rotary_pct=0.5,
        max_position_embeddings=128,
    )
    model = GPTNeoXForCausalLM(config)
    embeddings = {"gpt_neox.embed_in": model.get_input_embeddings, "embed_out": model.get_output_embeddings}
    return model, "gpt_neox.layers", model.gpt_neox.layers, embeddings


def made(folder, build, every, only_last=True, prefix=""):
    """(reference, tokenizer with the added tokens), and the folder that `load` reads."""
    torch.manual_seed(0)
    words = tokenizer()
    vision = CLIPVisionConfig(
        hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=3, image_size=SIDE, patch_size=4
    )
    text = CLIPTextConfig(vocab_size=50, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    clip = randomised(CLIPModel(CLIPConfig(vision_config=vision.to_dict(), text_config=text.to_dict())), seed=1)
    clip.save_pretrained(folder / "clip")
    square = {"height": SIDE, "width": SIDE}
    CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size=square).save_pretrained(folder / "clip")
    language, layers, modules, embeddings = build(len(words) + 20)  # padded, as the published ones are
    randomised(language, seed=2).save_pretrained(folder / "lm")
    words.save_pretrained(folder / "lm")
    words.add_special_tokens({"additional_special_tokens": ["<|endofchunk|>", "<image>"]})
    language.resize_token_embeddings(len(words))
    reference = Flamingo(
        clip.vision_model, language, modules, every, words.convert_tokens_to_ids("<image>"), LATENTS, DEPTH, only_last
    )
    randomised(reference.perceiver, seed=3)
    randomised(reference.gated, seed=4)
    state = {f"perceiver.{name}": tensor for name, tensor in reference.perceiver.state_dict().items()}
    for number, block in reference.gated.items():
        for name, tensor in block.state_dict().items():
            state[f"lang_encoder.{layers}.{number}.gated_cross_attn_layer.{name}"] = tensor
    for name, module in embeddings.items():
        state[f"lang_encoder.{name}.weight"] = module().weight.detach()
    state = {prefix + name: tensor for name, tensor in state.items()}
    torch.save({"epoch": 3, "model_state_dict": state, "optimizer_state_dict": {"m": torch.zeros(3)}}, folder / "checkpoint.pt")
    config = {"model_type": "open_flamingo", "checkpoint": "checkpoint.pt", "vision": "clip", "language": "lm"}
    (folder / "config.json").write_text(json.dumps(config | {"cross_attn_every_n_layers": every}))
    return reference.eval(), words, state


def pixels_of(vlm, pictures):
    vision = vlm.model.config.vision
    made = np.stack([vlm.processor.media.pixels((one,))[0] for one in pictures])
    scaled = (made / 255.0 - np.array(vision.mean)) / np.array(vision.std)
    return torch.tensor(scaled.transpose(0, 3, 1, 2)[None], dtype=torch.float32)


TEXT = "two dogs <image>a cat sits.<|endofchunk|><image>what color"


@pytest.mark.parametrize("build, every", [(mpt, 1), (mpt, 4), (neox, 2)], ids=["mpt_1", "mpt_4", "neox_2"])
def test_logits_answers_and_back(tmp_path, build, every):
    reference, words, state = made(tmp_path, build, every)
    with pytest.raises(ValueError, match=r"checkpoint.pt is a pickle. Allow it with"):
        vlm_jax.load(tmp_path)
    vlm = vlm_jax.load(tmp_path, dtype="float32", pickles=True)
    pictures = [picture(1, 30, 44), picture(2, 20, 17)]
    request = verbatim(vlm, TEXT, pictures)
    ids = laid_out(vlm, request).tokens.tolist()
    assert ids == words(TEXT)["input_ids"]
    pixels = pixels_of(vlm, pictures)
    with torch.no_grad():
        compare(logits(vlm, request), reference(torch.tensor([ids]), pixels)[0])
        expected = list(ids)
        for _ in range(8):
            expected.append(int(reference(torch.tensor([expected]), pixels)[0, -1].argmax()))
    answer = vlm.answer([request], max_new_tokens=8)[0].tokens
    assert answer == expected[len(ids) :][: len(answer)] and len(answer) in (8, answer.index(answer[-1]) + 1)
    vlm.checkpoint.export(vlm.params, tmp_path / "back")
    back = load_file(tmp_path / "back" / "model.safetensors")
    assert back.keys() == state.keys()
    for name, tensor in state.items():
        np.testing.assert_array_equal(back[name], tensor.numpy(), err_msg=name)
    again = vlm_jax.load(tmp_path / "back", dtype="float32")
    assert again.answer([request], max_new_tokens=8)[0].tokens == answer


def test_the_quirk_of_all_previous_images(tmp_path):
    """Text before the first image looks at all of them alike."""
    reference, _, _ = made(tmp_path, mpt, 2, only_last=False, prefix="module.")
    checkpoint = vlm_jax.load(tmp_path, dtype="float32", pickles=True).checkpoint
    fusion = dataclasses.replace(checkpoint.config.fusion, media="all_previous_uniform")
    config = dataclasses.replace(checkpoint.config, fusion=fusion)
    vlm = vlm_jax.load(dataclasses.replace(checkpoint, config=config), dtype="float32")
    pictures = [picture(1, 30, 44), picture(2, 20, 17)]
    request = verbatim(vlm, TEXT, pictures)
    ids = torch.tensor([laid_out(vlm, request).tokens.tolist()])
    with torch.no_grad():
        compare(logits(vlm, request), reference(ids, pixels_of(vlm, pictures))[0])


def test_what_is_missing_is_named(tmp_path):
    made(tmp_path, mpt, 1)
    config = json.loads((tmp_path / "config.json").read_text())
    for name, value, message in (
        ("language", "nowhere", "no checkpoint at nowhere"),
        ("checkpoint", "other.pt", "other.pt: there is no such file"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(config | {name: value}))
        with pytest.raises(ValueError, match=message):
            vlm_jax.load(tmp_path, pickles=True)
    del config["vision"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="'vision' is missing; expected checkpoint, vision, language, cross_attn_every"):
        vlm_jax.load(tmp_path, pickles=True)


def test_end_of_chunk_ends_an_answer(tmp_path):
    made(tmp_path, neox, 2)
    vlm = vlm_jax.load(tmp_path, dtype="float32", pickles=True)
    words = vlm.processor.tokenizer.hf_tokenizer
    assert vlm.processor.ends == {words.convert_tokens_to_ids("<|endofchunk|>")}
    assert vlm.settings() == Settings()


@pytest.mark.skipif(
    not (importlib.util.find_spec("open_flamingo") and importlib.util.find_spec("einops_exts")),
    reason="needs pip install --no-deps open-flamingo==2.0.1 einops einops-exts",
)
@pytest.mark.parametrize("only_last", [True, False])
def test_the_reference_is_what_the_package_computes(only_last):
    # The package itself imports open_clip and an old transformers; its modules do not.
    path = importlib.util.find_spec("open_flamingo").submodule_search_locations[0] + "/src/helpers.py"
    spec = importlib.util.spec_from_file_location("open_flamingo_helpers", path)
    helpers = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = helpers
    spec.loader.exec_module(helpers)
    ours = randomised(PerceiverResampler(24, DEPTH, LATENTS))
    theirs = helpers.PerceiverResampler(dim=24, depth=DEPTH, num_latents=LATENTS)
    theirs.load_state_dict(ours.state_dict())
    features = torch.randn(2, 3, 1, 7, 24)
    block = randomised(GatedCrossAttentionBlock(32, 24, only_last))
    published = helpers.GatedCrossAttentionBlock(dim=32, dim_visual=24, only_attend_immediate_media=only_last)
    published.load_state_dict(block.state_dict())
    places = torch.tensor([[0, 1, 0, 0, 1, 0], [1, 0, 0, 0, 0, 1]], dtype=torch.bool)
    x = torch.randn(2, 6, 32)
    with torch.no_grad():
        media = ours(features)
        compare(media, theirs(features), 1e-5)
        compare(block(x, media, places), published(x, media, media_locations=places), 1e-5)
