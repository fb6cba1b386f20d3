"""IDEFICS against transformers: vision tower, resampler, gated cross-attention and LLaMA in one."""

import dataclasses

import jax
import numpy as np
import pytest
import torch
from folders import EOS, PAD, exported_again, laid_out, load, logits, picture, saved, their_answer, tokenizer, verbatim
from torch_helpers import TOKENS, VOCAB, compare, converted, randomised, state_of, text_batch
from transformers import IdeficsConfig, IdeficsForVisionText2Text, IdeficsImageProcessorPil, IdeficsProcessor

from vlm_jax.families import idefics
from vlm_jax.generation.request import interleaved
from vlm_jax.interop.engine import abstract_params
from vlm_jax.models.vlm import VisionLanguageModel

IMAGES = 2
# The slots of the images that each token sees: none, the first, the second, both.
LAST = [[0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 2, 2], [1, 1, 1, 0, 0, 2, 2, 2, 2, 1, 1, 1]]
FIRST = [[0, 0, 1, 1, 1, 1, 1, 1, 1, 2, 2, 2], [1, 1, 1, 0, 0, 1, 1, 2, 2, 1, 1, 1]]


def hf_config(**changes) -> IdeficsConfig:
    sizes = dict(
        vocab_size=VOCAB - 4,
        additional_vocab_size=4,
        hidden_size=32,
        intermediate_size=56,
        num_hidden_layers=4,
        num_attention_heads=4,
        cross_layer_interval=2,
        qk_layer_norms=True,
        use_resampler=True,
        max_position_embeddings=64,
        vision_config=dict(
            embed_dim=24, image_size=16, patch_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=40
        ),
        perceiver_config=dict(
            use_resampler=True,
            resampler_depth=2,
            resampler_n_heads=3,
            resampler_head_dim=8,
            resampler_n_latents=5,
            qk_layer_norms_perceiver=True,
        ),
    )
    return IdeficsConfig(**sizes | changes)


def inputs(config, media: str):
    """The same for both: our batch, and IDEFICS's arguments."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(3, VOCAB, (2, TOKENS), dtype=np.int32)
    pixels = rng.integers(0, 256, (2, IMAGES, 16, 16, 3), dtype=np.uint8)
    last, first = np.array(LAST, np.int32), np.array(FIRST if media == "all_previous" else LAST, np.int32)
    batch = text_batch(
        tokens, images=pixels[:, :, None], frames=np.ones((2, IMAGES), np.int32), media_last=last, media_first=first
    )
    slots = np.arange(1, IMAGES + 1)
    seen = (first[..., None] <= slots) & (slots <= last[..., None])
    scaled = (pixels / 255.0 - np.array(config.vision.mean)) / np.array(config.vision.std)
    theirs = dict(
        input_ids=torch.tensor(tokens),
        pixel_values=torch.tensor(scaled.transpose(0, 1, 4, 2, 3), dtype=torch.float32),
        image_attention_mask=torch.tensor(seen.astype(np.int64)),
    )
    return batch, theirs


@pytest.mark.parametrize(
    "changes, media",
    [
        (dict(), "last"),
        (dict(), "all_previous"),
        (dict(qk_layer_norms=False, additional_vocab_size=0, vocab_size=VOCAB, tie_word_embeddings=True), "last"),
        (dict(tie_word_embeddings=True, cross_layer_interval=1), "last"),
    ],
    ids=["last", "all_previous", "tied_without_qk_norm", "tied_with_additional_vocabulary"],
)
def test_idefics(changes, media):
    published = hf_config(**changes)
    published.perceiver_config.qk_layer_norms_perceiver = published.qk_layer_norms
    oracle = randomised(IdeficsForVisionText2Text(published))
    config = idefics.config_from_hf(published)
    assert config.fusion.media == "last"
    config = dataclasses.replace(config, fusion=dataclasses.replace(config.fusion, media=media))
    table = idefics.table(config, published)
    model = VisionLanguageModel(config)
    params = converted(state_of(oracle), table, abstract_params(model))
    batch, theirs = inputs(config, media)
    ours = np.asarray(jax.jit(model.apply)({"params": params}, batch))
    with torch.no_grad():
        compare(ours, oracle(**theirs).logits)
        # The images are seen: other pictures give other logits.
        theirs["pixel_values"] = theirs["pixel_values"].flip(1)
        assert np.abs(oracle(**theirs).logits.numpy() - ours).max() > 0.1


def idefics_folder(folder, seed=0, **changes):
    words = tokenizer("<fake_token_around_image>", *changes.pop("extra", ()))
    published = hf_config(vocab_size=len(words) - 2, additional_vocab_size=2, pad_token_id=PAD, eos_token_id=EOS, **changes)
    processor = IdeficsProcessor(IdeficsImageProcessorPil(image_size=16), words)
    return saved(folder, IdeficsForVisionText2Text(published), processor, seed), processor


PROMPTS = [
    ("<image>what color is the shape?", [picture(1, 30, 44)]),
    ("a cat <image><image> two dogs</s> run <image> in the park", [picture(n, 20 + n, 40) for n in (2, 3, 4)]),
    ("the mat", []),
    ("sits on <image> the ", [picture(5, 16, 16)]),
]


def listed(text, pictures):
    """The prompt as their processor takes it."""
    pieces = text.split("<image>")
    parts = [pieces[0]] + [part for pair in zip(pictures, pieces[1:], strict=True) for part in pair]
    return [part for part in parts if part != ""]


@pytest.mark.parametrize("extra", [(), ("<end_of_utterance>",)], ids=["base", "instruct"])
def test_a_saved_folder(tmp_path, extra):
    """Tokens, pixels, which picture each token sees, logits, answers one by one and batched, and back."""
    model, processor = idefics_folder(tmp_path / "a", seed=2, extra=extra)
    vlm = load(tmp_path / "a")
    requests = [verbatim(vlm, *prompt) for prompt in PROMPTS]
    together = processor(text=[listed(*prompt) for prompt in PROMPTS])
    inputs = [processor(text=[listed(*prompt)]) for prompt in PROMPTS]
    vision = vlm.model.config.vision
    for request, theirs in zip(requests, inputs, strict=True):
        laid = laid_out(vlm, request)
        assert laid.tokens.tolist() == theirs["input_ids"][0].tolist()
        seen = (laid.media_last[:, None] == np.arange(1, theirs["image_attention_mask"].shape[-1] + 1)).astype(int)
        assert seen.tolist() == theirs["image_attention_mask"][0].int().tolist()
        for film, expected in zip(request.media, theirs["pixel_values"][0], strict=False):
            normal = (vlm.processor.media.pixels(film)[0] / 255.0 - np.array(vision.mean)) / np.array(vision.std)
            np.testing.assert_allclose(normal.transpose(2, 0, 1), expected.numpy(), atol=1e-6)
        with torch.no_grad():
            compare(logits(vlm, request), model(**theirs).logits[0])
    alone = [their_answer(model, one, 10)[0] for one in inputs]
    assert their_answer(model, together, 10) == alone
    assert [answer.tokens for answer in vlm.answer(requests, max_new_tokens=10)] == alone
    again = exported_again(vlm, tmp_path / "a", IdeficsForVisionText2Text, tmp_path / "b")
    with torch.no_grad():
        compare(logits(vlm, requests[1]), again(**inputs[1]).logits[0])


def test_texts_after_one_another_are_two_speakers(tmp_path):
    _, processor = idefics_folder(tmp_path, extra=("<end_of_utterance>",))
    vlm = load(tmp_path)
    texts = ["User: what?", " Assistant:"]
    assert laid_out(vlm, interleaved(texts)).tokens.tolist() == processor(text=[texts])["input_ids"][0].tolist()


def test_vector_gates_are_refused():
    with pytest.raises(ValueError, match=r"alpha_type='vector' \(only 'float' is implemented\)"):
        idefics.config_from_hf(hf_config(alpha_type="vector"))
