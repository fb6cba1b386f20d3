"""The tokenizer that a GGUF file describes in its metadata, without torch: byte-level BPE (GPT-2's) and sentencepiece BPE."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from vlm_jax.processing.tokenizer import TokenizerError

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Fast
    from transformers import PreTrainedTokenizerFast

CONTROL, USER_DEFINED = 3, 4  # values of `token_type`
SPECIAL = {"bos": "bos", "eos": "eos", "unknown": "unk", "padding": "pad"}  # names of special tokens -> transformers'
LLAMA3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def tokenizer_of(fields: Mapping[str, Any]) -> PreTrainedTokenizerFast:
    """
    Args:
      fields: the metadata of a file.

    Raises:
      TokenizerError: none is described, or one of a kind that is not implemented.
    """
    from tokenizers import AddedToken, processors
    from transformers import PreTrainedTokenizerFast

    of = lambda name, default=None: fields.get(f"tokenizer.ggml.{name}", default)
    kind, tokens = of("model"), of("tokens", [])
    if kind not in KINDS:
        raise TokenizerError(f"tokenizer.ggml.model is {kind!r}; expected one of {sorted(KINDS)}")
    for name in SPECIAL:
        number = of(f"{name}_token_id")
        if number is not None and not (isinstance(number, int) and 0 <= number < len(tokens)):
            raise TokenizerError(f"tokenizer.ggml.{name}_token_id={number}: expected the number of one of {len(tokens)} tokens")
    fast = KINDS[kind](of)
    types = of("token_type", [])
    named = lambda wanted: [token for token, found in zip(tokens, types, strict=False) if found == wanted]
    fast.add_special_tokens([AddedToken(token, normalized=False) for token in named(CONTROL)])
    fast.add_tokens([AddedToken(token, normalized=False) for token in named(USER_DEFINED)])
    special = {
        f"{ours}_token": tokens[of(f"{theirs}_token_id")]
        for theirs, ours in SPECIAL.items()
        if of(f"{theirs}_token_id") is not None
    }
    if of("add_bos_token", kind == "llama"):
        begin = special["bos_token"]
        post = processors.TemplateProcessing(
            single=[begin, "$A"], pair=[begin, "$A", f"{begin}:1", "$B:1"], special_tokens=[(begin, of("bos_token_id"))]
        )
        fast.post_processor = post
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=fast, **special)
    tokenizer.chat_template = fields.get("tokenizer.chat_template")
    return tokenizer


def _byte_level(of: Any) -> Fast:
    from tokenizers import Regex, decoders, models, pre_tokenizers
    from tokenizers import Tokenizer as Fast

    words = {
        "gpt-2": lambda: [pre_tokenizers.ByteLevel(add_prefix_space=False)],
        "smollm": lambda: [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)],
        "llama-bpe": lambda: [
            pre_tokenizers.Split(Regex(LLAMA3_WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ],
    }
    if (kind := of("pre")) not in words:
        raise TokenizerError(f"tokenizer.ggml.pre is {kind!r}; expected one of {sorted(words)}")
    merges = [tuple(merge.split(" ", 1)) for merge in of("merges")]
    # LLaMA 3 takes a word that is in the vocabulary whole.
    fast = Fast(models.BPE(_numbers(of("tokens")), merges, ignore_merges=kind == "llama-bpe"))
    fast.pre_tokenizer = pre_tokenizers.Sequence(words[kind]())
    fast.decoder = decoders.ByteLevel()
    return fast


def _sentencepiece(of: Any) -> Fast:
    from tokenizers import Tokenizer as Fast
    from tokenizers import decoders, models, pre_tokenizers

    tokens = of("tokens")
    unknown = of("unknown_token_id")
    model = models.BPE(
        _numbers(tokens),
        merges_of(tokens, of("scores")),
        unk_token=None if unknown is None else tokens[unknown],
        fuse_unk=True,
        byte_fallback=True,
    )
    prefix = of("add_space_prefix", True)
    fast = Fast(model)
    fast.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first" if prefix else "never", split=False)
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    fast.decoder = decoders.Sequence([*steps, decoders.Strip(" ", left=1)] if prefix else steps)
    return fast


KINDS = {"gpt2": _byte_level, "llama": _sentencepiece}


def _numbers(tokens: Sequence[str]) -> dict[str, int]:
    return {token: number for number, token in enumerate(tokens)}


def merges_of(tokens: Sequence[str], scores: Sequence[float]) -> list[tuple[str, str]]:
    """The merges that a sentencepiece vocabulary implies: every way to make a token of two others, the best token first."""
    numbers, found = _numbers(tokens), []
    for token, score in zip(tokens, scores, strict=True):
        halves = [(token[:i], token[i:]) for i in range(1, len(token)) if token[:i] in numbers and token[i:] in numbers]
        found += [(score, left, right) for left, right in sorted(halves, key=lambda pair: (numbers[pair[0]], numbers[pair[1]]))]
    found.sort(key=lambda one: (one[0], len(one[1]), len(one[2])), reverse=True)
    return [(left, right) for _, left, right in found]
