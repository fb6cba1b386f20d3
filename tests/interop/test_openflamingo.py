"""OpenFlamingo: its modules, its checkpoint's names, and answers, with each language model that it is made of."""

import dataclasses
import importlib.util
import json
import sys

import numpy as np
import pytest
import torch
from folders import laid_out, load, logits, picture, tokenizer, verbatim
from mosaic_gpt_reference import MosaicGpt
from openflamingo_reference import Flamingo, GatedCrossAttentionBlock, PerceiverResampler, open_clip_pixels
from safetensors.numpy import load_file
from torch_helpers import compare, randomised
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPVisionConfig,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MptConfig,
    MptForCausalLM,
    OPTConfig,
    OPTForCausalLM,
)

import vlm_jax
from tests.tiny import thorough
from vlm_jax.config.generation import Settings

SIDE, LATENTS, DEPTH = 16, 5, 2


# A vocabulary -> a language model, where its layers are, they themselves, and what the authors save of it: all trained
# parameters, everything with "embed" in its name, and heads that are tied to the embeddings.


def mosaic(vocabulary: int):
    model = MosaicGpt(vocabulary)
    parts = model.transformer
    return model, "transformer.blocks", parts["blocks"], {"transformer.wte": lambda: parts["wte"]}


def mpt(vocabulary: int):
    config = MptConfig(vocab_size=vocabulary, d_model=32, n_heads=4, n_layers=4, max_seq_len=128)
    model = MptForCausalLM(config)
    saved = {"transformer.wte": model.get_input_embeddings, "lm_head": model.get_output_embeddings}
    return model, "transformer.blocks", model.transformer.blocks, saved


def opt(vocabulary: int):
    sizes = dict(hidden_size=32, word_embed_proj_dim=32, num_hidden_layers=4, num_attention_heads=4, ffn_dim=56)
    model = OPTForCausalLM(OPTConfig(vocab_size=vocabulary, max_position_embeddings=128, **sizes))
    decoder = model.model.decoder
    saved = {"model.decoder.embed_tokens": model.get_input_embeddings, "lm_head": model.get_output_embeddings}
    saved |= {"model.decoder.embed_positions": lambda: decoder.embed_positions}
    return model, "model.decoder.layers", decoder.layers, saved


def llama(vocabulary: int):
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=32,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=56,
        max_position_embeddings=128,
    )
    model = LlamaForCausalLM(config)
    return model, "model.layers", model.model.layers, {"model.embed_tokens": model.get_input_embeddings}


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


def made(folder, build, every, only_last=True, prefix="", tower_alone=False, more=20):
    """(reference, tokenizer with the added tokens, what the checkpoint holds), and the folder that `load` reads.

    Args:
      tower_alone: whether the vision folder holds CLIP's vision tower only.
      more: tokens that the language model has beside the tokenizer's, before any is added.
    """
    torch.manual_seed(0)
    words = tokenizer()
    vision = CLIPVisionConfig(
        hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=3, image_size=SIDE, patch_size=4
    )
    text = CLIPTextConfig(vocab_size=50, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    clip = randomised(CLIPModel(CLIPConfig(vision_config=vision.to_dict(), text_config=text.to_dict())), seed=1)
    (clip.vision_model if tower_alone else clip).save_pretrained(folder / "clip")
    language, layers, modules, saved = build(len(words) + more)  # padded, as the published ones are
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
    for name, module in saved.items():
        state[f"lang_encoder.{name}.weight"] = module().weight.detach()
    state = {prefix + name: tensor for name, tensor in state.items()}
    torch.save({"epoch": 3, "model_state_dict": state, "optimizer_state_dict": {"m": torch.zeros(3)}}, folder / "checkpoint.pt")
    config = {"model_type": "open_flamingo", "checkpoint": "checkpoint.pt", "vision": "clip", "language": "lm"}
    (folder / "config.json").write_text(json.dumps(config | {"cross_attn_every_n_layers": every}))
    return reference.eval(), words, state


def pixels_of(pictures):
    return torch.stack([open_clip_pixels(one, SIDE) for one in pictures])[None]


TEXT = "two dogs <image>a cat sits.<|endofchunk|><image>what color"


@pytest.mark.parametrize(
    "build, every, tower_alone",
    [(mosaic, 1, False), (mpt, 4, True), thorough(neox, 2, False), thorough(opt, 2, False), (llama, 4, True)],
    ids=["mosaic_1", "mpt_4", "neox_2", "opt_2", "llama_4"],
)
def test_logits_answers_and_back(tmp_path, build, every, tower_alone):
    reference, words, state = made(tmp_path, build, every, tower_alone=tower_alone)
    with pytest.raises(ValueError, match=r"checkpoint.pt is a pickle. Allow it with"):
        vlm_jax.load(tmp_path)
    vlm = vlm_jax.load(tmp_path, dtype="float32", pickles=True)
    pictures = [picture(1, 30, 44), picture(2, 20, 17)]
    request = verbatim(vlm, TEXT, pictures)
    ids = laid_out(vlm, request).tokens.tolist()
    assert ids == words(TEXT)["input_ids"]
    pixels = pixels_of(pictures)
    with torch.no_grad():
        compare(logits(vlm, request), reference(torch.tensor([ids]), pixels)[0])
        expected = list(ids)
        for _ in range(8):
            expected.append(int(reference(torch.tensor([expected]), pixels)[0, -1].argmax()))
    answer = vlm.answer([request], max_new_tokens=8)[0].tokens
    assert answer == expected[len(ids) :][: len(answer)] and len(answer) in (8, answer.index(answer[-1]) + 1)
    vlm.checkpoint.export(vlm.params, tmp_path / "back")
    back = load_file(tmp_path / "back" / "model.safetensors")
    assert back.keys() == state.keys() - {"lang_encoder.lm_head.weight"}  # which is the embedding
    for name, tensor in back.items():
        np.testing.assert_array_equal(tensor, state[name].numpy(), err_msg=name)
    again = vlm_jax.load(tmp_path / "back", dtype="float32", pickles=build is mosaic)
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
        compare(logits(vlm, request), reference(ids, pixels_of(pictures))[0])


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


HEAD = "lang_encoder.lm_head.weight"


def test_a_frozen_tied_embedding_is_saved_as_the_head(tmp_path):
    _, _, state = made(tmp_path, mpt, 4)
    embedding = state.pop("lang_encoder.transformer.wte.weight")
    torch.save(state, tmp_path / "checkpoint.pt")
    vlm = load(tmp_path, pickles=True)
    np.testing.assert_array_equal(vlm.params["language"]["embedding"], embedding)
    state["lang_encoder.transformer.wte.weight"] = embedding + 1.0
    torch.save(state, tmp_path / "checkpoint.pt")
    with pytest.raises(ValueError, match=r"not equal to their original.*\n.*lm_head.weight and lang_encoder.transformer.wte"):
        load(tmp_path, pickles=True)


def test_a_head_without_the_added_rows_is_refused(tmp_path):
    """LLaMA's, which the authors neither train nor save: they resize it at random."""
    reference, words, state = made(tmp_path, llama, 4, more=-1)
    few, many = len(words) - 2, len(words)
    message = rf"checkpoint.pt: its vocabulary has {many} tokens, and lm_head.weight of .*lm has rows for {few}: .*{HEAD}"
    with pytest.raises(ValueError, match=message):
        load(tmp_path, pickles=True)
    state[HEAD] = reference.lang_encoder.lm_head.weight.detach()
    torch.save(state, tmp_path / "checkpoint.pt")
    np.testing.assert_array_equal(load(tmp_path, pickles=True).params["language"]["lm_head"]["kernel"], state[HEAD].T)


def test_a_tokenizer_that_the_checkpoint_was_not_made_with_is_refused(tmp_path):
    made(tmp_path, neox, 2)
    words = tokenizer()
    words.add_tokens(["one", "more"])
    words.save_pretrained(tmp_path / "lm")
    message = rf"checkpoint.pt: its vocabulary has {len(words) - 1} tokens, and the tokenizer of .*lm has {len(words) + 1} with"
    with pytest.raises(ValueError, match=message):
        load(tmp_path, pickles=True)


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
