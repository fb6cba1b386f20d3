"""Tokenizers of a few hundred tokens, made in memory, of the four kinds that published models have."""

from __future__ import annotations

import functools
import json
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

STYLES = ("bytes", "prepend", "metaspace_first", "metaspace_always")
SPECIAL = ("<unk>", "<s>", "</s>", "<pad>", "<image>")
UNK, BOS, EOS, PAD, IMAGE = range(5)
BYTES = tuple(f"<0x{byte:02X}>" for byte in range(256))
SPACE = "▁"
LINES = (
    "USER: what color is the shape? ASSISTANT: red",
    "USER: how many dogs are there? ASSISTANT: There are two dogs.",
    "USER: is the cat on the mat? ASSISTANT: Yes, it is.",
    "User: what is in the picture?\nAssistant: a cat sits on the mat.",
    "User: and what color is it?\nAssistant: It is blue, maybe green.",
    "[INST] what do you see? [/INST] I see a man, a woman and three children.",
    "[INST] describe the image in detail [/INST] The image shows a street.",
    "system\nYou are a helpful assistant.\nuser\nwhat is this?\nassistant\nThis is a car.",
    "Question: where was it taken? Short answer: in the park",
    "answer en where is the ball?\n",
    "two dogs run in the park, and the children run after them.",
    "the quick brown fox jumps over the lazy dog",
    "He didn't say 'no'; she said \"maybe\" (twice).",
    "for i in range(3):\n    print(i)\n",
    "if (a < b) { return x[0]; } else { return -1; }",
    '{"name": "cat", "size": [1, 2, 3]}',
    "On 2024-05-17 at 12:30 it was 21.5 degrees, 50% of 1024.",
    "a café in Köln, naïve people, Ångström",
    "日本語の文 汉字 한국어 привет שלום",
    "there  are   many    spaces",
    "line one\nline two\n\nline four",
    "What is written on the sign? It says: STOP!",
    "The red shape is a square; the green one is a circle.",
    "Is there a triangle? No, there is not.",
)


def tokenizer(style: str, *extra: str, **settings: Any) -> PreTrainedTokenizerFast:
    """`SPECIAL` and `extra` are its first tokens; it begins every text with `<s>`.

    Args:
      style: "bytes" is GPT-2's and LLaMA-3's byte-level BPE. "prepend" is LLaMA-2's and Mistral's BPE as published: a space is
        put before every stretch between special tokens, and what has no token becomes bytes. The others are SentencePiece's
        Unigram with bytes, a space before the text alone (which `legacy=False` means), or before every stretch and with NFKC.
    """
    names = dict(bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>", padding_side="left")
    names |= dict(extra_special_tokens={"image_token": "<image>"}, additional_special_tokens=list(extra))
    return PreTrainedTokenizerFast(tokenizer_object=_trained(style, extra), **names | settings)


@functools.cache
def _trained(style: str, extra: tuple[str, ...]) -> Tokenizer:
    special = (*SPECIAL, *extra)
    fast = _byte_level(special) if style == "bytes" else _llama(special) if style == "prepend" else _unigram(special, style)
    fast.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    fast.post_processor = processors.TemplateProcessing(single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", BOS)])
    return fast


def _byte_level(special: tuple[str, ...]) -> Tokenizer:
    fast = Tokenizer(models.BPE())
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    settings = dict(special_tokens=list(special), initial_alphabet=alphabet, show_progress=False)
    fast.train_from_iterator(LINES * 3, trainers.BpeTrainer(vocab_size=500, **settings))
    return fast


def _llama(special: tuple[str, ...]) -> Tokenizer:
    """Trained word by word, and then used without a pre-tokenizer, as converted SentencePiece models are."""
    draft = Tokenizer(models.BPE(unk_token="<unk>"))
    draft.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    draft.train_from_iterator(LINES * 3, trainers.BpeTrainer(vocab_size=450, special_tokens=[*special], show_progress=False))
    state = json.loads(draft.to_str())["model"]
    pieces = sorted(state["vocab"], key=state["vocab"].get)[len(special) :]
    spaces = [SPACE * 2, SPACE * 4]
    vocabulary = {piece: number for number, piece in enumerate([*special, *BYTES, *pieces, *spaces])}
    merges = [(SPACE, SPACE), (SPACE * 2, SPACE * 2), *map(tuple, state["merges"])]
    model = models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    fast = Tokenizer(model)
    fast.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)])
    fast.decoder = _to_text()
    return fast


def _unigram(special: tuple[str, ...], style: str) -> Tokenizer:
    scheme = style.removeprefix("metaspace_")
    draft = Tokenizer(models.Unigram())
    draft.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    settings = dict(special_tokens=list(special), unk_token="<unk>", show_progress=False)
    draft.train_from_iterator(LINES * 3, trainers.UnigramTrainer(vocab_size=350, **settings))
    pieces = json.loads(draft.to_str())["model"]["vocab"][len(special) :]
    rows = [*((token, 0.0) for token in special), *((byte, 0.0) for byte in BYTES), *map(tuple, pieces)]
    fast = Tokenizer(models.Unigram(rows, unk_id=UNK, byte_fallback=True))
    if scheme == "always":
        fast.normalizer = normalizers.NFKC()
    fast.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    fast.decoder = _to_text()
    return fast


def _to_text() -> decoders.Sequence:
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    return decoders.Sequence(steps)
