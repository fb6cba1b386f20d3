"""Tiny checkpoints as transformers saves them, with a tokenizer and a picture processor, and what it answers from them."""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch_helpers import randomised
from transformers import PreTrainedTokenizerFast

import vlm_jax
from vlm_jax.api import Vlm
from vlm_jax.batch import Batch
from vlm_jax.config.generation import Settings
from vlm_jax.encoders import Encoder
from vlm_jax.generation.request import Request
from vlm_jax.generation.request import verbatim as verbatim_request
from vlm_jax.processing.layout import Layout

LINES = ["USER: what color is the shape? ASSISTANT: red", "a cat sits on the mat", "two dogs run in the park"]
SPECIAL = ("<unk>", "<s>", "</s>", "<pad>", "<image>")
UNK, BOS, EOS, PAD, IMAGE = range(5)
CHAT = (
    "{% for message in messages %}{{ message['role'].upper() }}: {% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}{% if part['type'] == 'image' %}<image>\n{% else %}{{ part['text'] }}"
    "{% endif %}{% endfor %}{% endif %} {% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


@functools.cache
def _trained(extra: tuple[str, ...]) -> Tokenizer:
    fast = Tokenizer(models.BPE())
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=[*SPECIAL, *extra], initial_alphabet=alphabet, show_progress=False
    )
    fast.train_from_iterator(LINES * 3, trainer)
    fast.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    return fast


def tokenizer(*extra: str, **settings: Any) -> PreTrainedTokenizerFast:
    """`SPECIAL` and `extra` are its first tokens; it begins every text with `<s>`."""
    names = dict(bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>", padding_side="left")
    names |= dict(extra_special_tokens={"image_token": "<image>"}, additional_special_tokens=list(extra))
    return PreTrainedTokenizerFast(tokenizer_object=_trained(extra), **names | settings)


def saved(folder: Path, model: torch.nn.Module, processor: Any, seed: int = 0) -> torch.nn.Module:
    """The model with random weights, saved with its processor; the embedding large enough that answers differ."""
    randomised(model, seed)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return model


def picture(seed: int, height: int, width: int) -> Image.Image:
    """Smooth and coloured, so that resizing it by another method shows."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (5, 5, 3), dtype=np.uint8))
    noise = rng.integers(0, 40, (height, width, 3))
    array = np.asarray(small.resize((width, height), Image.Resampling.BICUBIC)).astype(int) + noise
    return Image.fromarray(array.clip(0, 255).astype(np.uint8))


def load(folder: Path, mesh: str | None = None, **settings: Any) -> Vlm | Encoder:
    return vlm_jax.load(folder, mesh, dtype="float32", **settings)


def verbatim(vlm: Vlm, text: str, images: Sequence[Image.Image] = ()) -> Request:
    """A prompt that is written out, with the checkpoint's own token for every picture."""
    return verbatim_request(text, vlm.processor.image_token, images)


def laid_out(vlm: Vlm, request: Request) -> Layout:
    return vlm.processor.lay_out(request.turns, request.sizes, open=True)


def placed(vlm: Vlm, *requests: Request) -> Batch:
    return vlm.generator.place([vlm.generator.prompt(request, 0, Settings()) for request in requests])


def all_logits(vlm: Vlm, requests: Sequence[Request]) -> list[np.ndarray]:
    """[T, V] of the tokens of each request, which are rows of one batch."""
    batch = placed(vlm, *requests)
    with jax.set_mesh(vlm.mesh):
        out = np.asarray(jax.jit(vlm.model.apply)({"params": vlm.params}, batch))
    used = np.asarray(batch.segments) > 0
    return [out[row, used[row]] for row in range(len(requests))]


def logits(vlm: Vlm, request: Request) -> np.ndarray:
    """[T, V] of a request's tokens."""
    return all_logits(vlm, [request])[0]


def their_answer(model: torch.nn.Module, inputs: Any, new: int, **settings: Any) -> list[list[int]]:
    """The new tokens of every row, until the end token."""
    with torch.no_grad():
        out = model.generate(**inputs, max_new_tokens=new, do_sample=False, **settings)
    rows = out[:, inputs["input_ids"].shape[1] :].tolist()
    return [row[: row.index(EOS) + 1] if EOS in row else row for row in rows]


def names_in(folder: Path) -> set[str]:
    from safetensors import safe_open

    return {name for file in folder.glob("*.safetensors") for name in safe_open(file, "np").keys()}  # noqa: SIM118


def exported_again(vlm: Vlm | Encoder, folder: Path, kind: type, new: Path) -> torch.nn.Module:
    """Exports, and loads it with transformers, which must find every key and no other."""
    vlm.checkpoint.export(vlm.checkpoint.load_params(vlm.mesh), new)
    model, info = kind.from_pretrained(new, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"], info
    for file in folder.iterdir():
        if file.suffix in (".json", ".jinja") and file.name != "config.json":
            assert file.read_bytes() == (new / file.name).read_bytes()
    theirs, ours = (json.loads((place / "config.json").read_text()) for place in (folder, new))
    assert theirs == ours
    return model.eval()


def asked(processor: Any, texts: Sequence[str], images: Sequence[Image.Image] | None) -> Any:
    """Their processor's inputs for PyTorch."""
    settings = dict(padding=True, return_tensors="pt")
    return processor(images=list(images), text=list(texts), **settings) if images else processor.tokenizer(texts, **settings)
