"""LLaVA-1.5, BakLLaVA and LLaVA-NeXT against transformers: tokens, pixels, logits, answers, five spellings, and back."""

import jax
import numpy as np
import pytest
import torch
from folders import (
    BOS,
    CHAT,
    EOS,
    IMAGE,
    PAD,
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
from torch_helpers import compare
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    Dinov2Config,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaImageProcessorPil,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextImageProcessorPil,
    LlavaNextProcessor,
    LlavaProcessor,
    MistralConfig,
    SiglipVisionConfig,
)

from tests.tiny import thorough
from vlm_jax.config import DataConfig, JsonLinesConfig
from vlm_jax.families.llava_next import anyres_places
from vlm_jax.interop.published import open_published
from vlm_jax.training.processors import write_processing

SIDE, PATCH = 16, 4
PINPOINTS = [[16, 32], [32, 16], [32, 32], [48, 16], [16, 48]]
SIZES = dict(
    hidden_size=32,
    intermediate_size=56,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=512,
    pad_token_id=PAD,
    eos_token_id=EOS,
    bos_token_id=BOS,
)
VISION = dict(
    hidden_size=24, intermediate_size=40, num_hidden_layers=3, num_attention_heads=3, image_size=SIDE, patch_size=PATCH
)


def class_and_registers(config):
    """How many features of a vision encoder are no patches'."""
    return 0 if config.model_type == "siglip_vision_model" else 1 + getattr(config, "num_register_tokens", 0)


def llava(folder, text=LlamaConfig, vision=CLIPVisionConfig, chat=CHAT, seed=0, sizes=None, tower=None, **changes):
    """(the torch model, its processor), saved in the folder."""
    words = tokenizer()
    config = LlavaConfig(
        vision_config=vision(**VISION | (tower or {})),
        text_config=text(**SIZES | (sizes or {}), vocab_size=len(words)),
        **dict(image_token_index=IMAGE, image_seq_length=16) | changes,
    )
    processor = LlavaProcessor(
        image_processor=CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}),
        tokenizer=words,
        patch_size=config.vision_config.patch_size,
        vision_feature_select_strategy=config.vision_feature_select_strategy,
        num_additional_image_tokens=class_and_registers(config.vision_config),
        chat_template=chat,
    )
    return saved(folder, LlavaForConditionalGeneration(config), processor, seed), processor


def llava_next(folder, text=LlamaConfig, vision=CLIPVisionConfig, seed=0, sizes=None, tower=None, **changes):
    words = tokenizer()
    config = LlavaNextConfig(
        vision_config=vision(**VISION | (tower or {})),
        text_config=text(**SIZES | (sizes or {}), vocab_size=len(words)),
        image_token_index=IMAGE,
        image_grid_pinpoints=PINPOINTS,
        **changes,
    )
    pixels = LlavaNextImageProcessorPil(
        size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}, image_grid_pinpoints=PINPOINTS
    )
    processor = LlavaNextProcessor(
        image_processor=pixels,
        tokenizer=words,
        patch_size=config.vision_config.patch_size,
        vision_feature_select_strategy=config.vision_feature_select_strategy,
        num_additional_image_tokens=class_and_registers(config.vision_config),
        chat_template=CHAT,
    )
    return saved(folder, LlavaNextForConditionalGeneration(config), processor, seed), processor


TEXT = "USER: <image>\nwhat color is the shape? ASSISTANT:"
FULL = dict(vision_feature_select_strategy="full")
TWO = "USER: <image><image> two dogs? ASSISTANT: yes USER: and <image>? ASSISTANT:"


@pytest.mark.parametrize(
    "changes",
    [
        dict(),
        dict(text=MistralConfig, sizes=dict(sliding_window=9, head_dim=12, num_attention_heads=3, num_key_value_heads=1)),
        dict(vision_feature_layer=-1, vision_feature_select_strategy="full", multimodal_projector_bias=False),
        dict(tie_word_embeddings=True, vision_feature_layer=1, projector_hidden_act="relu"),
        dict(vision=SiglipVisionConfig, vision_feature_select_strategy="full"),
    ],
    ids=["llama", "mistral", "last_layer_full", "tied_first_layer", "siglip"],
)
def test_logits_and_back(tmp_path, changes):
    compare_logits_and_back(tmp_path, changes)


def compare_logits_and_back(tmp_path, changes):
    model, processor = llava(tmp_path / "a", **changes)
    vlm = load(tmp_path / "a")
    pictures = [picture(1, 30, 44), picture(2, 16, 16), picture(3, 50, 20)]
    inputs = asked(processor, [TWO], pictures)
    request = verbatim(vlm, TWO, pictures)
    assert laid_out(vlm, request).tokens.tolist() == inputs["input_ids"][0].tolist()
    pixels = np.concatenate([vlm.processor.media.pixels(film) for film in request.media])
    vision = vlm.model.config.vision
    normal = (pixels / 255.0 - np.array(vision.mean)) / np.array(vision.std)
    np.testing.assert_allclose(normal.transpose(0, 3, 1, 2), inputs["pixel_values"].numpy(), atol=1e-6)
    ours = logits(vlm, request)
    with torch.no_grad():
        compare(ours, model(**inputs).logits[0])
        again = exported_again(vlm, tmp_path / "a", LlavaForConditionalGeneration, tmp_path / "b")
        compare(ours, again(**inputs).logits[0])


def test_text_alone(tmp_path):
    model, processor = llava(tmp_path)
    vlm = load(tmp_path)
    request = verbatim(vlm, "a cat sits on the mat")
    inputs = asked(processor, ["a cat sits on the mat"], None)
    with torch.no_grad():
        compare(logits(vlm, request), model(**inputs).logits[0])


@pytest.mark.parametrize(
    "changes",
    [
        dict(),
        dict(text=MistralConfig),
        dict(vision=SiglipVisionConfig, vision_feature_layer=[-1, 1], **FULL),
        dict(vision=Dinov2Config),
    ],
    ids=["llama", "mistral", "siglip_two_layers", "dinov2"],
)
def test_next_logits_and_back(tmp_path, changes):
    model, processor = llava_next(tmp_path / "a", **changes)
    vlm = load(tmp_path / "a")
    pictures = [picture(1, 30, 44), picture(2, 11, 60), picture(3, 70, 20)]
    inputs = asked(processor, [TWO], pictures)
    request = verbatim(vlm, TWO, pictures)
    assert laid_out(vlm, request).tokens.tolist() == inputs["input_ids"][0].tolist()
    ours = logits(vlm, request)
    with torch.no_grad():
        compare(ours, model(**inputs).logits[0])
        again = exported_again(vlm, tmp_path / "a", LlavaNextForConditionalGeneration, tmp_path / "b")
        compare(ours, again(**inputs).logits[0])


@pytest.mark.parametrize(
    ("make", "mesh"),
    [(llava, None), thorough(llava, "data=2,tensor=4"), thorough(llava_next, None), (llava_next, "data=2,tensor=4")],
)
def test_answers(tmp_path, make, mesh):
    """Different lengths and numbers of pictures in one batch: theirs one by one, theirs batched, ours batched."""
    model, processor = make(tmp_path, seed=3)
    vlm = load(tmp_path, mesh)
    many = [(TEXT, [picture(1, 30, 44)]), (TWO, [picture(n, 20 + n, 40) for n in range(3)]), (TEXT, [picture(5, 17, 16)])]
    answers = vlm.answer([verbatim(vlm, *one) for one in many], max_new_tokens=12)
    alone = [their_answer(model, asked(processor, [text], pictures), 12)[0] for text, pictures in many]
    assert [answer.tokens for answer in answers] == alone
    texts, pictures = [text for text, _ in many], [one for _, pictures in many for one in pictures]
    assert their_answer(model, asked(processor, texts, pictures), 12) == alone
    assert len({tuple(tokens) for tokens in alone}) > 1


def test_the_chat_template_is_used_as_theirs(tmp_path):
    _, processor = llava(tmp_path)
    vlm = load(tmp_path)
    content = [{"type": "text", "text": "is "}, {"type": "image"}, {"type": "text", "text": " red?"}]
    messages = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "a cat"}]},
        {"role": "user", "content": content},
    ]
    rendered = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    pictures = [picture(1, 20, 20), picture(2, 30, 30)]
    request = vlm.request("is <image> red?", pictures[1:], [(pictures[:1], "what?", "a cat")])
    expected = asked(processor, [rendered], pictures)["input_ids"][0].tolist()
    assert laid_out(vlm, request).tokens.tolist() == expected
    begun = verbatim(vlm, "<s>" + TEXT, pictures[:1])
    plain = verbatim(vlm, TEXT, pictures[:1])
    assert laid_out(vlm, begun).tokens.tolist() == laid_out(vlm, plain).tokens.tolist(), "a begin token is not repeated"


def test_pictures_that_are_no_squares_are_refused(tmp_path):
    _, processor = llava(tmp_path)
    processor.image_processor.do_center_crop = False
    processor.save_pretrained(tmp_path)
    vlm = load(tmp_path)
    with pytest.raises(ValueError, match="gives pictures of 16x32 pixels where the vision encoder takes 16x16"):
        vlm.generate("what?", images=[picture(1, 20, 40)])


def test_square_padding_is_a_choice(tmp_path):
    """The authors' expand2square, which transformers' LLaVA processor has too; not the default. A run keeps the choice."""
    llava(tmp_path)
    llava(tmp_path / "kept")
    data = dict(source=JsonLinesConfig(train="", eval=""), image_size=SIDE, rows=1, tokens=1, images=1)
    write_processing(DataConfig(**data, pad_to_square=True), tmp_path / "kept")
    padded = LlavaImageProcessorPil(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}, do_pad=True)
    vlm, plain, kept = load(tmp_path, pad_to_square=True), load(tmp_path), load(tmp_path / "kept")
    for image in (picture(1, 31, 44), picture(2, 60, 21), picture(3, 20, 20)):
        theirs = padded(image, return_tensors="np")["pixel_values"][0]
        pixels, vision = vlm.processor.media.pixels((image,))[0], vlm.model.config.vision
        ours = ((pixels / 255.0 - np.array(vision.mean)) / np.array(vision.std)).transpose(2, 0, 1)
        np.testing.assert_allclose(ours, theirs, atol=1e-6)
        np.testing.assert_array_equal(kept.processor.media.pixels((image,))[0], pixels)
        if image.size[0] != image.size[1]:
            assert not np.array_equal(pixels, plain.processor.media.pixels((image,))[0])
    llava_next(tmp_path / "next")
    with pytest.raises(ValueError, match=r"only LLaVA-1\.5 was evaluated with pictures padded to squares"):
        load(tmp_path / "next", pad_to_square=True)


def spelled(state, tower, projector, language, head):
    """The same tensors under other names."""
    new = {}
    for name, tensor in state.items():
        for old, replacement in (
            ("vision_tower.vision_model.", tower),
            ("multi_modal_projector.", projector),
            ("language_model.model.", language),
            ("language_model.lm_head.", head),
        ):
            if name.startswith(old):
                name = replacement + name[len(old) :]
                break
        name = name.replace("mm_projector.linear_1.", "mm_projector.0.").replace("mm_projector.linear_2.", "mm_projector.2.")
        new[name] = tensor
    return new


LAYOUTS = {
    "saved by 5.x": ("vision_tower.", "multi_modal_projector.", "language_model.model.", "language_model.lm_head."),
    "5.x in memory": ("model.vision_tower.", "model.multi_modal_projector.", "model.language_model.", "lm_head."),
    "4.52 in memory": ("model.vision_tower.vision_model.", "model.multi_modal_projector.", "model.language_model.", "lm_head."),
    "original": ("model.vision_tower.vision_tower.vision_model.", "model.mm_projector.", "model.", "lm_head."),
}


def test_five_spellings(tmp_path):
    llava(tmp_path / "a")
    vlm = load(tmp_path / "a")
    vlm.checkpoint.export(vlm.params, tmp_path / "hub")
    hub = load_file(tmp_path / "hub" / "model.safetensors")
    assert any(name.startswith("vision_tower.vision_model.") for name in hub)
    for names in LAYOUTS.values():
        save_file(spelled(hub, *names), tmp_path / "hub" / "model.safetensors")
        again = open_published(tmp_path / "hub").load_params(vlm.generator.mesh)
        jax.tree.map(np.testing.assert_array_equal, vlm.params, again)


def test_token_counts_of_any_size():
    points = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
    processor = LlavaNextProcessor.__new__(LlavaNextProcessor)
    processor.image_processor = LlavaNextImageProcessorPil(image_grid_pinpoints=points)
    processor.patch_size, processor.num_additional_image_tokens = 14, 0
    rng = np.random.default_rng(0)
    for size in [(336, 336), (672, 672), *rng.integers(1, 2500, (800, 2)).tolist()]:
        theirs = processor._get_number_of_features(*size, 336, 336)
        assert len(anyres_places(tuple(size), points, 336, 14)) == theirs, size
    published = {(336, 336): 1176, (672, 672): 2928, (480, 640): 2340, (640, 480): 2352, (300, 1000): 2182, (1000, 300): 2232}
    assert {size: len(anyres_places(size, points, 336, 14)) for size in published} == published
