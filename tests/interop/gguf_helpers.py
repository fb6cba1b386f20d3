"""Tiny GGUF files as llama.cpp's `convert_hf_to_gguf.py` writes them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Type
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

TEXTS = [
    "A giraffe is 1234 cm tall, isn't it?",
    "  Überall\n\nzwei Füße:\t42",
    "<image> 猫が2匹 🙂 <|im_start|>user<|im_end|></s> the the there",
]
WORDS = [*TEXTS, "the giraffe and the heron and the frog are there " * 3]
NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def write_gguf(path: Path, model: torch.nn.Module, tokenizer: dict[str, Any], types: tuple[Type, ...], **fields: Any) -> None:
    """A LLaMA of transformers as a file whose matrices are of `types` in turn.

    Args:
      tokenizer, fields: metadata beside those of the model; None leaves one out. `rope_freqs` is written as a tensor.
    """
    config = model.config
    writer = gguf.GGUFWriter(path, fields.pop("architecture", "llama"))
    frequencies = fields.pop("rope_freqs", None)
    values = {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "rope.freq_base": float(config.rope_parameters["rope_theta"]),
        "rope.dimension_count": config.head_dim,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "vocab_size": config.vocab_size,
    }
    values = {f"llama.{name}": value for name, value in values.items()} | tokenizer | fields
    for name, value in values.items():
        add = {
            bool: writer.add_bool,
            int: writer.add_uint32,
            float: writer.add_float32,
            str: writer.add_string,
            list: writer.add_array,
        }
        if value is not None:
            add[type(value)](name, value)
    if frequencies is not None:
        writer.add_tensor("rope_freqs.weight", frequencies)
    matrices = 0
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        weights = tensor.numpy()
        if "q_proj" in name or "k_proj" in name:
            heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
            weights = weights.reshape(heads, 2, -1, weights.shape[1]).swapaxes(1, 2).reshape(weights.shape)
        name = name.replace("model.layers.", "blk.")
        for theirs, ours in NAMES.items():
            name = name.replace(theirs, ours)
        kind = Type.F32
        if weights.ndim == 2:
            kind = types[matrices % len(types)]
            matrices += 1
        writer.add_tensor(name, gguf.quantize(np.ascontiguousarray(weights), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def byte_level(pre: str) -> dict[str, Any]:
    """Metadata of a byte-level BPE as GPT-2's, its three first tokens special."""
    fast = Tokenizer(models.BPE())
    digits = [pre_tokenizers.Digits(individual_digits=True)] if pre == "smollm" else []
    fast.pre_tokenizer = pre_tokenizers.Sequence([*digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    fast.train_from_iterator(
        WORDS, trainers.BpeTrainer(vocab_size=300, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    )
    tokens, merges = _trained(fast)
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.merges": [" ".join(merge) for merge in merges],
        "tokenizer.ggml.token_type": [3, 3, 3] + [1] * (len(tokens) - 3),
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 0,
        "tokenizer.ggml.padding_token_id": 0,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": "{% for m in messages %}<|im_start|>{{ m['content'] }}{% endfor %}",
    }


def sentencepiece() -> dict[str, Any]:
    """Metadata of a sentencepiece BPE as LLaMA's: unknown, begin, end, 256 bytes, then what was learned."""
    fast = Tokenizer(models.BPE())
    fast.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁")
    fast.train_from_iterator(WORDS[3:], trainers.BpeTrainer(vocab_size=90, show_progress=False))
    learned, _ = _trained(fast)
    # The scores, not the order of the tokens, say what is merged first.
    scores = [-float(number) for number in range(len(learned))]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *learned[::-1], "<think>"]
    types = [2, 3, 3] + [6] * 256 + [1] * len(learned) + [4]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [0.0] * 259 + scores[::-1] + [0.0],
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    }


def _trained(fast: Tokenizer) -> tuple[list[str], list[list[str]]]:
    vocab = fast.get_vocab()
    return sorted(vocab, key=vocab.get), json.loads(fast.to_str())["model"]["merges"]
