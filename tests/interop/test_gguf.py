"""GGUF files against transformers' own loader: logits, tokens, and what is refused."""

import sys

import jax
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Type
from gguf_helpers import TEXTS, byte_level, sentencepiece, write_gguf
from torch_helpers import compare, randomised, text_batch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from tests.tiny import mesh_of
from vlm_jax.families.gguf_llama import open_gguf
from vlm_jax.interop.checkpoint import Checkpoint
from vlm_jax.interop.engine import to_published
from vlm_jax.interop.files.gguf_tokenizer import tokenizer_of
from vlm_jax.interop.files.source import PublishedError
from vlm_jax.models.vlm import VisionLanguageModel
from vlm_jax.processing.tokenizer import Tokenizer, TokenizerError

PLAIN = byte_level("smollm")
TOKENS = np.random.default_rng(0).integers(2, 290, (2, 12), dtype=np.int32)
LINEAR = dict(rope_type="linear", rope_theta=100.0, factor=3.0)
LLAMA3 = dict(
    rope_type="llama3",
    rope_theta=100.0,
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=32,
)


def llama_of(vocab: int = 300, **changes) -> LlamaForCausalLM:
    sizes = dict(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        rope_parameters=dict(rope_type="default", rope_theta=100.0),
    )
    return randomised(LlamaForCausalLM(LlamaConfig(vocab_size=vocab, **sizes | changes)))


def params_of(read: Checkpoint, tensor: int = 1):
    return VisionLanguageModel(read.config), read.load_params(mesh_of(1, 1, tensor))


def logits_of(read: Checkpoint, tensor: int = 1) -> jax.Array:
    model, params = params_of(read, tensor)
    return jax.jit(model.apply)({"params": params}, text_batch(TOKENS))


def logits_of_torch(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.tensor(TOKENS)).logits


@pytest.mark.parametrize(
    ("types", "changes", "tensor"),
    [
        ((Type.Q8_0, Type.F16, Type.Q4_1, Type.F32), dict(tie_word_embeddings=True), 1),
        ((Type.Q4_1, Type.Q8_0), dict(num_key_value_heads=4), 2),
        ((Type.F16,), dict(hidden_size=48, num_attention_heads=3, num_key_value_heads=1, head_dim=12), 1),
    ],
    ids=["mixed_tied", "q4_q8_on_two_devices", "three_heads_f16"],
)
def test_logits_of_transformers_from_the_same_file(tmp_path, types, changes, tensor):
    write_gguf(tmp_path / "a.gguf", llama_of(**changes), PLAIN, types)
    oracle = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="a.gguf", dtype=torch.float32)
    read = open_gguf(tmp_path / "a.gguf")
    assert read.config.language.tied_head == oracle.config.tie_word_embeddings == changes.get("tie_word_embeddings", False)
    compare(logits_of(read, tensor), logits_of_torch(oracle))


@pytest.mark.parametrize("scaling", [LINEAR, LLAMA3], ids=["linear", "llama3"])
def test_scaled_rope(tmp_path, scaling):
    """transformers' loader leaves scaling out; what was written is the reference."""
    model = llama_of(rope_parameters=scaling)
    if scaling is LINEAR:
        fields = {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 3.0}
    else:
        plain = 1 / 100.0 ** (np.arange(0, 16, 2, dtype=np.float32) / 16)
        fields = {"rope_freqs": (plain / model.model.rotary_emb.inv_freq.numpy()).astype(np.float32)}
    write_gguf(tmp_path / "a.gguf", model, PLAIN, (Type.F32,), **fields)
    compare(logits_of(open_gguf(tmp_path / "a.gguf")), logits_of_torch(model))


def test_any_rows_of_a_quantised_tensor_and_the_way_back(tmp_path):
    write_gguf(tmp_path / "a.gguf", llama_of(), PLAIN, (Type.Q8_0, Type.Q4_1))
    read = open_gguf(tmp_path / "a.gguf")
    source = read.open_source()
    whole = lambda name: source.read(name, tuple(slice(0, size) for size in source.tensors[name].shape))
    part = source.read("blk.1.attn_q.weight", (slice(5, 9), slice(30, 37)))
    np.testing.assert_array_equal(part, whole("blk.1.attn_q.weight")[5:9, 30:37])
    back = to_published(params_of(read)[1], read.tables[0])
    assert back.keys() == source.tensors.keys()
    for name, tensor in back.items():
        np.testing.assert_array_equal(tensor, whole(name), err_msg=name)


@pytest.mark.parametrize("kind", ["smollm", "gpt-2", "llama-bpe", "sentencepiece", "sentencepiece_without_begin"])
def test_tokens_and_chat_of_transformers_from_the_same_file(tmp_path, kind):
    fields = sentencepiece() if kind.startswith("sentencepiece") else byte_level(kind)
    if kind.endswith("without_begin"):
        fields |= {"tokenizer.ggml.add_bos_token": False}
    write_gguf(tmp_path / "a.gguf", llama_of(len(fields["tokenizer.ggml.tokens"])), fields, (Type.F16,))
    ours = open_gguf(tmp_path / "a.gguf").processor.tokenizer.hf_tokenizer
    theirs = AutoTokenizer.from_pretrained(tmp_path, gguf_file="a.gguf")
    assert ours.get_vocab() == theirs.get_vocab()
    for text in [*TEXTS, "a<think>b", "safe afro", "", " "]:  # in "afe" and "afro" the order of merges tells
        ids = ours(text).input_ids
        assert ids == theirs(text).input_ids, text
        assert ours.decode(ids, skip_special_tokens=True) == theirs.decode(ids, skip_special_tokens=True)
        if kind == "smollm" and "<|" not in text:
            assert ours.decode(ids) == text
    assert (ours.bos_token_id, ours.eos_token_id) == (theirs.bos_token_id, theirs.eos_token_id)
    if ours.chat_template:
        chat = [{"role": "user", "content": "the heron"}]
        assert ours.apply_chat_template(chat, tokenize=False) == theirs.apply_chat_template(chat, tokenize=False)
    wrapped = Tokenizer(ours)
    assert wrapped.decode(wrapped.encode("the giraffe")) == "the giraffe"


def test_digits_stand_alone_for_smollm():
    fields = byte_level("gpt-2")
    fields["tokenizer.ggml.tokens"] = [*fields["tokenizer.ggml.tokens"], "12"]
    fields["tokenizer.ggml.merges"] = [*fields["tokenizer.ggml.merges"], "1 2"]
    fields["tokenizer.ggml.token_type"] = [*fields["tokenizer.ggml.token_type"], 1]
    count = lambda pre: len(tokenizer_of(fields | {"tokenizer.ggml.pre": pre})("1212").input_ids)
    assert (count("gpt-2"), count("smollm")) == (2, 4)


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        (dict(architecture="gemma"), PublishedError, r"a.gguf: general.architecture is 'gemma'; only 'llama'"),
        ({"llama.rope.scaling.type": "yarn"}, PublishedError, "llama.rope.scaling.type='yarn'; only none and linear"),
        ({"llama.expert_count": 8}, PublishedError, "llama.expert_count=8; only 0"),
        ({"llama.rope.dimension_count": 8}, PublishedError, "llama.rope.dimension_count=8; only 16"),
        ({"llama.context_length": None}, PublishedError, "the metadata have no llama.context_length"),
        ({"tokenizer.ggml.pre": "tekken"}, TokenizerError, r"tokenizer.ggml.pre is 'tekken'; expected one of \['gpt-2'"),
        ({"tokenizer.ggml.model": None}, TokenizerError, r"tokenizer.ggml.model is None; expected one of \['gpt2', 'llama'\]"),
    ],
)
def test_what_is_not_implemented_is_refused(tmp_path, fields, error, message):
    write_gguf(tmp_path / "a.gguf", llama_of(num_hidden_layers=1), PLAIN, (Type.F16,), **fields)
    with pytest.raises(error, match=message):
        open_gguf(tmp_path / "a.gguf")


def test_files_that_cannot_be_read(tmp_path, monkeypatch):
    with pytest.raises(PublishedError, match=r"none\.gguf: there is no such file"):
        open_gguf(tmp_path / "none.gguf")
    write_gguf(tmp_path / "a.gguf", llama_of(num_hidden_layers=1), PLAIN, (Type.F16,))
    content = (tmp_path / "a.gguf").read_bytes()
    for name, damaged in (("text", b"no model at all"), ("short", content[: len(content) // 2]), ("stump", content[:3000])):
        (tmp_path / name).write_bytes(damaged)
        with pytest.raises(PublishedError, match=f"{name}: no GGUF file, or a damaged one"):
            open_gguf(tmp_path / name)
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(PublishedError, match=r"pip install 'vlm_jax\[gguf\]'"):
        open_gguf(tmp_path / "a.gguf")
