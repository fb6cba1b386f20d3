"""Language models from folders that transformers saved: text in, greedy text out, token for token, and the folder back."""

import jax
import numpy as np
import pytest
import torch
from folders import BOS, EOS, PAD, exported_again, load, logits, saved, their_answer, tokenizer, verbatim
from safetensors.numpy import load_file, save_file
from torch_helpers import compare
from transformers import LlamaConfig, LlamaForCausalLM, MptConfig, MptForCausalLM, OPTConfig, OPTForCausalLM

from vlm_jax.errors import RequestError
from vlm_jax.interop.plan import ConversionError

TOKENS = dict(pad_token_id=PAD, eos_token_id=EOS, bos_token_id=BOS)
LONGEST, NEW = 24, 24
TEXTS = [
    "a cat sits on the mat",
    "what",
    "USER: two dogs run in the park, is the shape red? ASSISTANT: a cat sits on the mat, yes",
]


def opt_350m(vocabulary):
    sizes = dict(hidden_size=32, ffn_dim=48, num_hidden_layers=3, num_attention_heads=4, max_position_embeddings=128)
    changes = dict(do_layer_norm_before=False, word_embed_proj_dim=16)
    return OPTForCausalLM(OPTConfig(vocab_size=vocabulary, **sizes, **changes, **TOKENS))


def mpt_with_no_bias_false(vocabulary):
    sizes = dict(d_model=32, n_heads=4, n_layers=3, max_seq_len=128)
    return MptForCausalLM(MptConfig(vocab_size=vocabulary, no_bias=False, **sizes, **TOKENS))


def dynamic_ntk(vocabulary):
    rope = dict(rope_type="dynamic", rope_theta=50.0, factor=2.0)
    sizes = dict(hidden_size=32, intermediate_size=56, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2)
    config = LlamaConfig(vocab_size=vocabulary, max_position_embeddings=LONGEST, rope_parameters=rope, **sizes, **TOKENS)
    return LlamaForCausalLM(config)


def made(folder, build):
    words = tokenizer()
    model = saved(folder, build(len(words)), words, seed=1)
    if build is opt_350m:
        # Else the biases choose the same token behind every text.
        for name, parameter in model.named_parameters():
            if "embed_positions" in name or name.endswith("bias"):
                parameter.data.mul_(0.1)
            elif "embed_tokens" in name:
                parameter.data.mul_(3)
        model.save_pretrained(folder)
    return model, words


@pytest.mark.parametrize("build", [opt_350m, mpt_with_no_bias_false, dynamic_ntk])
def test_logits_answers_and_back(tmp_path, build):
    """PyTorch's model is read anew for each text: its dynamic NTK remembers the longest one."""
    kind, words = type(made(tmp_path / "a", build)[0]), tokenizer()
    vlm = load(tmp_path / "a")
    requests, inputs = [verbatim(vlm, text) for text in TEXTS], [words(text, return_tensors="pt") for text in TEXTS]
    for one in inputs:
        one.pop("token_type_ids", None)
    fresh = lambda: kind.from_pretrained(tmp_path / "a").eval()
    for request, one in zip(requests, inputs, strict=True):
        with torch.no_grad():
            compare(logits(vlm, request), fresh()(**one).logits[0])
    answers = [answer.tokens for answer in vlm.answer(requests, max_new_tokens=NEW)]
    assert answers == [their_answer(fresh(), one, NEW)[0] for one in inputs]
    assert len(set(map(tuple, answers))) == len(TEXTS)
    again = exported_again(vlm, tmp_path / "a", kind, tmp_path / "b")
    with torch.no_grad():
        compare(logits(vlm, requests[2]), again(**inputs[2]).logits[0])


def test_dynamic_ntk_goes_beyond_the_limit_and_others_stop(tmp_path):
    _, words = made(tmp_path / "a", dynamic_ntk)
    lengths = [len(words(text)["input_ids"]) for text in TEXTS]
    assert max(lengths) > LONGEST > min(lengths) > LONGEST - NEW, "prompts on both sides, one of which grows across it"
    vlm = load(tmp_path / "a")
    answer = vlm.answer([verbatim(vlm, TEXTS[1])], max_new_tokens=4 * LONGEST)[0]
    assert answer.finish_reason in ("max_new_tokens", "end_token")
    plain = lambda vocabulary: LlamaForCausalLM(
        LlamaConfig(vocab_size=vocabulary, hidden_size=16, num_attention_heads=2, max_position_embeddings=LONGEST, **TOKENS)
    )
    made(tmp_path / "plain", plain)
    vlm = load(tmp_path / "plain")
    with pytest.raises(RequestError, match=f"the model reads at most {LONGEST} with the answer"):
        vlm.answer([verbatim(vlm, TEXTS[2])])


def test_a_file_without_the_head_has_names_without_the_prefix(tmp_path):
    """As the hub's OPT-350M."""
    made(tmp_path / "a", opt_350m)
    vlm = load(tmp_path / "a")
    file = tmp_path / "a" / "model.safetensors"
    bare = {name.removeprefix("model."): tensor for name, tensor in load_file(file).items() if name != "lm_head.weight"}
    assert "decoder.project_in.weight" in bare
    save_file(bare, file)
    jax.tree.map(np.testing.assert_array_equal, load(tmp_path / "a").params, vlm.params)


def test_biases_that_would_be_dropped_are_refused(tmp_path):
    made(tmp_path, mpt_with_no_bias_false)
    file = tmp_path / "model.safetensors"
    save_file(load_file(file) | {"transformer.blocks.1.attn.Wqkv.bias": np.ones(96, np.float32)}, file)
    with pytest.raises(ConversionError, match=r"no row of the table knows.*\n.*transformer\.blocks\.1\.attn\.Wqkv\.bias"):
        load(tmp_path)
