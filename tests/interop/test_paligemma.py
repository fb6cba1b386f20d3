"""PaliGemma against transformers: the prompt sees all of itself, pictures and text, and the answer what was before it."""

import json

import jax
import numpy as np
import pytest
import torch
from folders import (
    BOS,
    EOS,
    IMAGE,
    PAD,
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
from torch_helpers import compare, text_batch
from transformers import (
    GemmaConfig,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    PaliGemmaProcessor,
    SiglipImageProcessorPil,
    SiglipVisionConfig,
)

SIDE, PATCH = 16, 4


def paligemma(folder, seed=0, text=None, vision=None, **changes):
    words = tokenizer()
    pixels = SiglipImageProcessorPil(size={"height": SIDE, "width": SIDE})
    pixels.image_seq_length = (SIDE // PATCH) ** 2
    processor = PaliGemmaProcessor(pixels, words)
    sizes = dict(
        hidden_size=32,
        intermediate_size=56,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=12,
        max_position_embeddings=256,
        pad_token_id=PAD,
        eos_token_id=EOS,
        bos_token_id=BOS,
    )
    tower = dict(
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=3,
        image_size=SIDE,
        patch_size=PATCH,
        vision_use_head=False,
    )
    config = PaliGemmaConfig(
        vision_config=SiglipVisionConfig(**tower | (vision or {})),
        text_config=GemmaConfig(**sizes | (text or {}), vocab_size=len(processor.tokenizer)),
        image_token_index=IMAGE,
        projection_dim=(sizes | (text or {}))["hidden_size"],
        **changes,
    )
    return saved(folder, PaliGemmaForConditionalGeneration(config), processor, seed), processor


PROMPTS = [
    ("<image>what color is the shape?", [picture(1, 30, 44)]),
    ("<image><image>two dogs run in the park", [picture(2, 16, 16), picture(3, 40, 20)]),
    ("<image>cat", [picture(4, 10, 70)]),
]


@pytest.mark.parametrize(
    "changes",
    [
        dict(),
        dict(text=dict(num_attention_heads=3, num_key_value_heads=3, head_dim=8), vision=dict(num_attention_heads=1)),
        dict(tie_word_embeddings=False, vision=dict(hidden_act="gelu", layer_norm_eps=0.01)),
    ],
    ids=["mqa", "mha", "untied"],
)
def test_logits_answers_and_back(tmp_path, changes):
    model, processor = paligemma(tmp_path / "a", seed=1, **changes)
    vlm = load(tmp_path / "a")
    requests = [verbatim(vlm, *prompt) for prompt in PROMPTS]
    alone = []
    for (text, pictures), request in zip(PROMPTS, requests, strict=True):
        theirs = processor(images=pictures, text=text, return_tensors="pt")
        theirs.pop("labels")
        assert laid_out(vlm, request).tokens.tolist() == theirs["input_ids"][0].tolist()
        pixels = np.concatenate([vlm.processor.media.pixels(film) for film in request.media])
        normal = (pixels / 255.0 - 0.5) / 0.5
        np.testing.assert_allclose(normal.transpose(0, 3, 1, 2), theirs["pixel_values"].numpy(), atol=1e-6)
        with torch.no_grad():
            compare(logits(vlm, request), model(**theirs).logits[0])
        alone += their_answer(model, theirs, 10)
    assert [answer.tokens for answer in vlm.answer(requests, max_new_tokens=10)] == alone
    again = exported_again(vlm, tmp_path / "a", PaliGemmaForConditionalGeneration, tmp_path / "b")
    with torch.no_grad():
        compare(logits(vlm, requests[2]), again(**theirs).logits[0])


def test_another_tower_is_refused(tmp_path):
    """Of which transformers would read features that no PaliGemma was trained with."""
    paligemma(tmp_path)
    file = tmp_path / "config.json"
    config = json.loads(file.read_text())
    config["vision_config"]["model_type"] = "clip_vision_model"
    file.write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"model_type='clip_vision_model' \(only 'siglip_vision_model' is implemented\)"):
        load(tmp_path)


SUFFIXES = ((7, 4), (5, 2))  # tokens of a conversation, and of its prompt


def test_the_suffix_is_causal_in_training(tmp_path):
    """A packed row of two conversations, each as their model reads it alone with its prefix and suffix told."""
    model, _ = paligemma(tmp_path, seed=1)
    vlm = load(tmp_path)
    rng = np.random.default_rng(0)
    tokens = rng.integers(5, 200, (1, 12), dtype=np.int32)
    sizes, prefixes = zip(*SUFFIXES, strict=True)
    segments = np.repeat([[1, 2]], sizes, axis=1).astype(np.int32)
    positions = np.concatenate([np.arange(size) for size in sizes])[None].astype(np.int32)
    starts = (0, 7)
    ends = [position if position >= prefix else prefix - 1 for size, prefix in SUFFIXES for position in range(size)]
    batch = text_batch(
        tokens, segments=segments, positions=positions, prefix_end=np.asarray([ends], np.int32), images=None, frames=None
    )
    ours = np.asarray(jax.jit(vlm.model.apply)({"params": vlm.params}, batch))[0]
    for start, size, prefix in zip(starts, sizes, prefixes, strict=True):
        kinds = torch.tensor([[0] * prefix + [1] * (size - prefix)])
        ids = torch.tensor(tokens[:, start : start + size], dtype=torch.long)
        with torch.no_grad():
            theirs = model(input_ids=ids, attention_mask=torch.ones_like(ids), token_type_ids=kinds).logits[0]
        compare(ours[start : start + size], theirs)
