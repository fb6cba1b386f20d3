"""IDEFICS2 against transformers: pictures of several shapes at once, crops, the resampler, answers, and back."""

import jax
import numpy as np
import pytest
import torch
from folders import BOS, EOS, PAD, exported_again, load, logits, picture, saved, their_answer, tokenizer
from torch_helpers import compare
from transformers import (
    Idefics2Config,
    Idefics2ForConditionalGeneration,
    Idefics2ImageProcessorPil,
    Idefics2Processor,
    MistralConfig,
)

from vlm_jax.ops.patches import bucketed_positions

CHAT = (
    "{% for message in messages %}{{ message['role'].capitalize() }}:{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}{% endfor %}<end_of_utterance>\n"
    "{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}"
)


def idefics2(folder, seed=0, split=False, sides=(12, 36), text=None, vision=None, perceiver=None, **changes):
    """(the torch model, its processor), saved in the folder. The tower has 6 x 6 positions of 4 pixels."""
    named = dict(image_token="<image>", image_boundary_token="<fake_token_around_image>")
    words = tokenizer("<fake_token_around_image>", "<end_of_utterance>", extra_special_tokens=named)
    sizes = dict(
        hidden_size=32,
        intermediate_size=56,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        sliding_window=None,
        pad_token_id=PAD,
        eos_token_id=EOS,
        bos_token_id=BOS,
        vocab_size=len(words),
    )
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
    pixels = Idefics2ImageProcessorPil(size=dict(shortest_edge=sides[0], longest_edge=sides[1]), do_image_splitting=split)
    processor = Idefics2Processor(pixels, words, image_seq_len=config.perceiver_config.resampler_n_latents, chat_template=CHAT)
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
        text=dict(num_attention_heads=3, num_key_value_heads=1, hidden_size=30, sliding_window=9),
        vision=dict(num_attention_heads=1, hidden_act="gelu", layer_norm_eps=0.01, num_hidden_layers=3),
        perceiver=dict(resampler_n_heads=3, num_key_value_heads=3, resampler_depth=1, resampler_n_latents=5, rms_norm_eps=1e-3),
    ),
    "tied, any size": dict(tie_word_embeddings=True, sides=(5, 50)),
}


def theirs_of(processor, text, pictures):
    return processor(images=[pictures] if pictures else None, text=[text], return_tensors="pt")


@pytest.mark.parametrize("case", CASES)
def test_logits_answers_and_back(tmp_path, case):
    model, processor = idefics2(tmp_path / "a", seed=2, **CASES[case])
    vlm = load(tmp_path / "a")
    requests = [vlm.processor.request(*prompt) for prompt in PROMPTS]
    alone = []
    for (text, pictures), request in zip(PROMPTS, requests, strict=True):
        theirs = theirs_of(processor, text, pictures)
        assert vlm.processor.lay_out(request).tokens.tolist() == theirs["input_ids"][0].tolist()
        frames = [frame for film in request.images for frame in vlm.processor.pixels(film)]
        for number, frame in enumerate(frames):
            mask = theirs["pixel_attention_mask"][0, number].numpy()
            assert frame.shape[:2] == (mask.any(1).sum(), mask.any(0).sum())
            expected = theirs["pixel_values"][0, number].numpy()[:, : frame.shape[0], : frame.shape[1]]
            np.testing.assert_allclose((frame / 255.0 - 0.5).transpose(2, 0, 1) / 0.5, expected, atol=1e-6)
        with torch.no_grad():
            compare(logits(vlm, request), model(**theirs).logits[0])
        alone += their_answer(model, theirs, 10)
    assert [answer.tokens for answer in vlm.answer(requests, max_new_tokens=10)] == alone
    assert len({tuple(tokens) for tokens in alone}) > 1
    again = exported_again(vlm, tmp_path / "a", Idefics2ForConditionalGeneration, tmp_path / "b")
    with torch.no_grad():
        compare(logits(vlm, requests[3]), again(**theirs).logits[0])


def test_visual_tokens(tmp_path):
    """Of each picture by itself: those of others, of other shapes, and the padding change nothing."""
    model, processor = idefics2(tmp_path, split=True)
    vlm = load(tmp_path)
    text, pictures = PROMPTS[1]
    prompts = vlm.generator.place([vlm.generator.prompt(vlm.processor.request(text, pictures), 0, vlm.settings())])
    assert prompts.images.shape[3:5] == (64, 64) and prompts.sizes.shape == (1, 4, 8, 2)
    arguments = (prompts.images, prompts.frames, False, prompts.sizes)
    run = jax.jit(lambda params, *x: vlm.model.apply({"params": params}, *x, method="encode_images")[0], static_argnums=3)
    ours = np.asarray(run(vlm.params, *arguments)).reshape(4, 8, 3, 32)
    noisy = jax.random.bits(jax.random.key(0), prompts.images.shape, np.uint8)
    rows, columns = (np.arange(64) < np.asarray(prompts.sizes)[..., axis, None] for axis in (0, 1))
    there = rows[..., :, None, None] & columns[..., None, :, None]
    again = np.asarray(run(vlm.params, np.where(there, prompts.images, noisy), *arguments[1:])).reshape(ours.shape)
    np.testing.assert_array_equal(again[:3, :5], ours[:3, :5])
    inputs = theirs_of(processor, text, pictures)
    with torch.no_grad():
        theirs = model.model.get_image_features(inputs["pixel_values"], inputs["pixel_attention_mask"]).pooler_output
    compare(ours[:3, :5].reshape(-1, 32), torch.cat(list(theirs)))


def test_a_mesh_answers_the_same(tmp_path):
    idefics2(tmp_path, seed=3)
    asked = lambda vlm: [vlm.processor.request(*prompt) for prompt in PROMPTS]
    alone, spread = (load(tmp_path, mesh) for mesh in (None, "data=2,fsdp=2,tensor=2"))
    tokens = lambda vlm: [answer.tokens for answer in vlm.answer(asked(vlm), max_new_tokens=8)]
    assert tokens(alone) == tokens(spread)


def test_the_chat_template(tmp_path):
    _, processor = idefics2(tmp_path)
    vlm = load(tmp_path)
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what?"}]}]
    text = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    expected = theirs_of(processor, text, [picture(1, 20, 20)])["input_ids"][0].tolist()
    assert vlm.processor.lay_out(vlm.request("what?", [picture(1, 20, 20)])).tokens.tolist() == expected


def test_positions_of_every_length_of_the_published_tower():
    """980 pixels of 14: the shares and their buckets are float32, and not what whole numbers would give."""
    side = 70
    boundaries = torch.arange(1 / side, 1.0, 1 / side)
    whole_numbers = 0
    for length in range(1, 131):
        shares = torch.arange(length, dtype=torch.float32) * (1.0 / torch.tensor(length))
        expected = torch.bucketize(shares.clamp(max=1.0 - 1e-6), boundaries, right=True).numpy()
        places, there = bucketed_positions(np.array([[length, 1]]), (130, 1), side)
        np.testing.assert_array_equal(np.asarray(places)[0, :length], expected * side)
        assert np.asarray(there)[0].sum() == length
        whole_numbers += not np.array_equal(expected, np.arange(length) * side // length)
    assert whole_numbers > 0
