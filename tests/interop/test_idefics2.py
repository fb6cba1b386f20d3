"""IDEFICS2 against transformers: pictures of several shapes at once, crops, the resampler, answers, and back."""

import json

import jax
import numpy as np
import pytest
import torch
from folders import PAD, all_logits, exported_again, laid_out, load, picture, placed, saved, their_answer, tokenizer, verbatim
from test_llava import SIZES
from torch_helpers import compare
from transformers import (
    Idefics2Config,
    Idefics2ForConditionalGeneration,
    Idefics2ImageProcessorPil,
    Idefics2Processor,
    Idefics2VisionConfig,
    MistralConfig,
)
from transformers.models.idefics2.modeling_idefics2 import Idefics2VisionEmbeddings

from tests.tiny import thorough
from vlm_jax.interop.files.source import PublishedError
from vlm_jax.ops.patches import bucketed_positions, patch_mask

CHAT = (
    "{% for message in messages %}{{ message['role'].capitalize() }}:{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}{% endfor %}<end_of_utterance>\n"
    "{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}"
)


def idefics2(folder, seed=0, split=False, sides=(12, 36), pixels=None, text=None, vision=None, perceiver=None, **changes):
    """(the torch model, its processor), saved in the folder. The tower has 6 x 6 positions of 4 pixels."""
    named = dict(image_token="<image>", image_boundary_token="<fake_token_around_image>")
    words = tokenizer("<fake_token_around_image>", "<end_of_utterance>", extra_special_tokens=named)
    sizes = SIZES | dict(sliding_window=None, vocab_size=len(words))
    tower = dict(hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=3, image_size=24, patch_size=4)
    resampler = dict(
        hidden_size=32,
        resampler_n_latents=3,
        resampler_depth=2,
        resampler_n_heads=4,
        resampler_head_dim=6,
        num_key_value_heads=2,
    )
    text = sizes | (text or {})
    config = Idefics2Config(
        text_config=MistralConfig(**text),
        vision_config=tower | (vision or {}),
        perceiver_config=resampler | dict(hidden_size=text["hidden_size"]) | (perceiver or {}),
        image_token_id=words.convert_tokens_to_ids("<image>"),
        pad_token_id=PAD,
        **changes,
    )
    size = dict(shortest_edge=sides[0], longest_edge=sides[1])
    pictures = Idefics2ImageProcessorPil(size=size, do_image_splitting=split, **pixels or {})
    count = config.perceiver_config.resampler_n_latents
    processor = Idefics2Processor(pictures, words, image_seq_len=count, chat_template=CHAT)
    return saved(folder, Idefics2ForConditionalGeneration(config), processor, seed), processor


PROMPTS = [
    ("User:<image>what color is the shape?<end_of_utterance>\nAssistant:", [picture(1, 30, 44)]),
    ("<image><image>two dogs run <image> in the park", [picture(2, 16, 16), picture(3, 70, 20), picture(4, 9, 50)]),
    ("a cat sits on the mat", []),
    ("the <image>", [picture(5, 13, 14)]),
]
CASES = {
    "gqa": dict(),
    "crops": dict(split=True),
    "odd": dict(
        pixels=dict(image_mean=[0.4, 0.5, 0.6], image_std=[0.3, 0.2, 0.4]),
        text=dict(num_attention_heads=3, num_key_value_heads=1, hidden_size=30, sliding_window=9),
        vision=dict(num_attention_heads=1, hidden_act="gelu", layer_norm_eps=0.01, num_hidden_layers=3),
        perceiver=dict(resampler_n_heads=3, num_key_value_heads=3, resampler_depth=1, resampler_n_latents=5, rms_norm_eps=1e-3),
    ),
    "tied, any size": dict(tie_word_embeddings=True, sides=(5, 50)),
}


def theirs_of(processor, text, pictures):
    return processor(images=[pictures] if pictures else None, text=[text], return_tensors="pt")


@pytest.mark.parametrize("case", ["gqa", "crops", thorough("odd"), thorough("tied, any size")])
def test_logits_answers_and_back(tmp_path, case):
    model, processor = idefics2(tmp_path / "a", seed=2, **CASES[case])
    vlm = load(tmp_path / "a")
    requests = [verbatim(vlm, *prompt) for prompt in PROMPTS]
    alone = []
    for (text, pictures), request, ours in zip(PROMPTS, requests, all_logits(vlm, requests), strict=True):
        theirs = theirs_of(processor, text, pictures)
        assert laid_out(vlm, request).tokens.tolist() == theirs["input_ids"][0].tolist()
        frames = [frame for film in request.media for frame in vlm.processor.media.pixels(film)]
        for number, frame in enumerate(frames):
            mask = theirs["pixel_attention_mask"][0, number].numpy()
            assert frame.shape[:2] == (mask.any(1).sum(), mask.any(0).sum())
            expected = theirs["pixel_values"][0, number].numpy()[:, : frame.shape[0], : frame.shape[1]]
            mean, std = processor.image_processor.image_mean, processor.image_processor.image_std
            np.testing.assert_allclose(((frame / 255.0 - mean) / std).transpose(2, 0, 1), expected, atol=1e-6)
        with torch.no_grad():
            compare(ours, model(**theirs).logits[0])
        alone += their_answer(model, theirs, 10)
    assert [answer.tokens for answer in vlm.answer(requests, max_new_tokens=10)] == alone
    if case != "gqa":
        assert [vlm.answer([request], max_new_tokens=10)[0].tokens for request in requests] == alone
    texts, pictures = map(list, zip(*PROMPTS, strict=True))
    batched = processor(images=pictures, text=texts, padding=True, padding_side="left", return_tensors="pt")
    assert their_answer(model, batched, 10) == alone
    assert len({tuple(tokens) for tokens in alone}) == len(PROMPTS)
    again = exported_again(vlm, tmp_path / "a", Idefics2ForConditionalGeneration, tmp_path / "b")
    with torch.no_grad():
        compare(ours, again(**theirs).logits[0])


def encoded(vlm, text, pictures):
    """Of each crop of a prompt's pictures: its patches' features, and its visual tokens."""
    prompts = placed(vlm, verbatim(vlm, text, pictures))

    def parts(model, images, frames, sizes):
        flat, of_each = images.reshape(-1, *images.shape[3:]), sizes.reshape(-1, 2)
        there = model.vision.patch_mask(of_each, *flat.shape[1:3])
        return model.vision(flat, of_each), there, model.encode_images(images, frames, sizes=sizes)[0]

    run = jax.jit(lambda params, *x: vlm.model.apply({"params": params}, *x, method=parts))
    features, there, visual = map(np.asarray, run(vlm.params, prompts.images, prompts.frames, prompts.sizes))
    visual = visual.reshape(len(features), -1, visual.shape[-1])
    # A crop has a slot; slots are padded to a power of two.
    used = (np.arange(prompts.images.shape[2]) < np.asarray(prompts.frames)[0, :, None]).ravel()
    return [feature[mask] for feature, mask in zip(features[used], there[used], strict=True)], visual[used]


@pytest.mark.parametrize("case", CASES)
def test_features_and_visual_tokens(tmp_path, case):
    """The tower and the connector by themselves: of every crop, its own patches."""
    model, processor = idefics2(tmp_path, seed=4, **CASES[case])
    features, visual = encoded(load(tmp_path), *PROMPTS[1])
    inputs = theirs_of(processor, *PROMPTS[1])
    with torch.no_grad():
        theirs = model.model.get_image_features(inputs["pixel_values"], inputs["pixel_attention_mask"])
    whole = inputs["pixel_attention_mask"][0].unfold(1, 4, 4).unfold(2, 4, 4).flatten(-2).all(-1).flatten(1)
    assert len(features) == len(whole) == 3 * (5 if CASES[case].get("split") else 1)
    assert len({mask.sum().item() for mask in whole}) > 1, "pictures of several sizes"
    for ours, expected, mask in zip(features, theirs.last_hidden_state, whole, strict=True):
        compare(ours, expected[mask])
    compare(visual.reshape(-1, visual.shape[-1]), torch.cat(list(theirs.pooler_output)))


def test_padding_changes_nothing(tmp_path):
    """Neither what lies around a picture nor the pictures beside it, bit for bit."""
    idefics2(tmp_path, split=True)
    vlm = load(tmp_path)
    text, pictures = PROMPTS[1]
    prompts = placed(vlm, verbatim(vlm, text, pictures))
    assert prompts.images.shape[3:5] == (64, 64) and prompts.sizes.shape == (1, 16, 1, 2)
    arguments = (prompts.images, prompts.frames, prompts.sizes)
    encode = lambda model, images, frames, sizes: model.encode_images(images, frames, sizes=sizes)[0]
    run = jax.jit(lambda params, *x: vlm.model.apply({"params": params}, *x, method=encode))
    ours = np.asarray(run(vlm.params, *arguments)).reshape(16, 3, 32)
    noisy = jax.random.bits(jax.random.key(0), prompts.images.shape, np.uint8)
    rows, columns = (np.arange(64) < np.asarray(prompts.sizes)[..., axis, None] for axis in (0, 1))
    there = rows[..., :, None, None] & columns[..., None, :, None]
    again = np.asarray(run(vlm.params, np.where(there, prompts.images, noisy), *arguments[1:])).reshape(ours.shape)
    np.testing.assert_array_equal(again[:15], ours[:15])  # five crops of three pictures


@pytest.mark.parametrize("count", [2, 5])
def test_a_processor_of_another_model(tmp_path, count):
    """The model makes 3 visual tokens of a picture."""
    idefics2(tmp_path)
    path = tmp_path / "processor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | dict(image_seq_len=count)))
    with pytest.raises(PublishedError, match=f"image_seq_len={count} .* 3 visual tokens"):
        load(tmp_path)


def test_a_mesh_answers_the_same(tmp_path):
    idefics2(tmp_path, seed=3)
    asked = lambda vlm: [verbatim(vlm, *prompt) for prompt in PROMPTS]
    alone, spread = (load(tmp_path, mesh) for mesh in (None, "data=2,fsdp=2,tensor=2"))
    tokens = lambda vlm: [answer.tokens for answer in vlm.answer(asked(vlm), max_new_tokens=8)]
    assert tokens(alone) == tokens(spread)


def test_the_chat_template(tmp_path):
    _, processor = idefics2(tmp_path)
    vlm = load(tmp_path)
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what?"}]}]
    text = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    expected = theirs_of(processor, text, [picture(1, 20, 20)])["input_ids"][0].tolist()
    assert laid_out(vlm, vlm.request("what?", [picture(1, 20, 20)])).tokens.tolist() == expected


@pytest.mark.parametrize("side", [1, 2, 6, 16, 20, 27, 49, 70, 98])
def test_positions_of_every_length(side):
    """Against the embedding itself; 980 pixels of 14 are 70. Shares and boundaries are float32, no whole numbers."""
    most = 2 * side + 3
    tower = Idefics2VisionConfig(hidden_size=1, num_attention_heads=1, image_size=side, patch_size=1)
    embedding = Idefics2VisionEmbeddings(tower)
    embedding.patch_embedding.weight.data.zero_()
    embedding.patch_embedding.bias.data.zero_()
    embedding.position_embedding.weight.data = torch.arange(side * side, dtype=torch.float32)[:, None]
    lengths = torch.arange(1, most + 1)
    sizes = torch.stack([lengths, lengths.flip(0)], dim=1)
    there = (torch.arange(most) < sizes[:, :1])[:, :, None] & (torch.arange(most) < sizes[:, 1:])[:, None]
    with torch.no_grad():
        expected = embedding(torch.zeros(most, 3, most, most), there)[..., 0].numpy().astype(int)
    places = np.asarray(bucketed_positions(sizes.numpy(), (most, most), side))
    mask = np.asarray(patch_mask(sizes.numpy(), (most, most)))
    np.testing.assert_array_equal(mask, there.flatten(1).numpy())
    np.testing.assert_array_equal(places[mask], expected[mask])
    if side == 70:
        row = lambda length: np.arange(length) * side // length
        wrong = [n for n in range(1, most + 1) if not np.array_equal(places[n - 1].reshape(most, most)[:n, 0] // side, row(n))]
        assert wrong, "whole numbers would do"
