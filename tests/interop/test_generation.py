"""Beam search and repetition penalty, token for token as transformers: alone and batched, with text and with pictures."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from folders import BOS, EOS, PAD, asked, load, picture, saved, their_answer, tokenizer, verbatim
from test_idefics import PROMPTS, idefics_folder, listed
from test_llava import TEXT, TWO, llava
from transformers import AutoConfig, LlamaConfig, LlamaForCausalLM

from tests.tiny import thorough
from vlm_jax.config.generation import Settings
from vlm_jax.errors import RequestError
from vlm_jax.interop.files.source import PublishedError
from vlm_jax.interop.published import _generation

NEW = 10
TEXTS = ["a cat sits on the mat", "what color", "two dogs run in the park USER: is the shape red? ASSISTANT:"]
# Many tokens end an answer, so that hypotheses finish at different lengths.
ENDS = [EOS, *range(20, 260, 9)]


def language_model(folder, seed=0):
    words = tokenizer()
    config = LlamaConfig(
        vocab_size=len(words),
        hidden_size=32,
        intermediate_size=56,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        pad_token_id=PAD,
        eos_token_id=EOS,
        bos_token_id=BOS,
    )
    model = LlamaForCausalLM(config)
    model.generation_config.eos_token_id = ENDS
    return saved(folder, model, words, seed), words


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    model, words = language_model(folder)
    vlm = load(folder)
    assert vlm.processor.ends == set(ENDS)
    return model, words, vlm


def until_an_end(tokens):
    ends = [place for place, token in enumerate(tokens) if token in ENDS]
    return tokens[: ends[0] + 1] if ends else tokens


def theirs(model, words, line, new=NEW, **settings):
    inputs = words(line, return_tensors="pt")
    with torch.no_grad():
        out = model.generate(**inputs, max_new_tokens=new, do_sample=False, **settings)
    return until_an_end(out[0, inputs["input_ids"].shape[1] :].tolist())


@pytest.mark.parametrize("early", [False, True])
@pytest.mark.parametrize("penalty", [0.0, 1.0, 2.0, -1.0])
@pytest.mark.parametrize("beams", [2, 3, thorough(5)])
def test_beams(text, beams, penalty, early):
    model, words, vlm = text
    settings = dict(length_penalty=penalty, early_stopping=early)
    expected = [theirs(model, words, line, num_beams=beams, **settings) for line in TEXTS]
    requests = [verbatim(vlm, line) for line in TEXTS]
    answers = vlm.answer(requests, max_new_tokens=NEW, beams=beams, **settings)
    assert [answer.tokens for answer in answers] == expected
    assert vlm.answer(requests[:1], max_new_tokens=NEW, beams=beams, **settings)[0].tokens == expected[0], "alone"


def test_the_beam_cases_tell_something(text):
    """Beams differ from greedy, settings from one another, and answers end at different lengths."""
    model, words, _ = text
    greedy = [theirs(model, words, line) for line in TEXTS]
    short, long = ([theirs(model, words, line, num_beams=3, length_penalty=p) for line in TEXTS] for p in (-1.0, 2.0))
    assert short != greedy and short != long
    assert len({len(tokens) for tokens in [*short, *long]}) > 1 and max(map(len, long)) > min(map(len, short))


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("penalty", [1.3, 0.8])
def test_repetition_penalty(text, beams, penalty):
    model, words, vlm = text
    expected = [theirs(model, words, line, num_beams=beams, repetition_penalty=penalty) for line in TEXTS]
    assert expected != [theirs(model, words, line, num_beams=beams) for line in TEXTS]
    requests = [verbatim(vlm, line) for line in TEXTS]
    answers = vlm.answer(requests, max_new_tokens=NEW, beams=beams, repetition_penalty=penalty)
    assert [answer.tokens for answer in answers] == expected


@pytest.mark.parametrize("settings", [dict(), dict(beams=3), dict(repetition_penalty=1.5)], ids=str)
def test_log_probabilities_are_the_models_own(text, settings):
    model, words, vlm = text
    for line, answer in zip(TEXTS, vlm.answer([verbatim(vlm, t) for t in TEXTS], max_new_tokens=NEW, **settings), strict=True):
        prompt = words(line)["input_ids"]
        with torch.no_grad():
            logits = model(torch.tensor([prompt + answer.tokens])).logits[0, len(prompt) - 1 : -1]
        expected = logits.log_softmax(-1)[range(len(answer.tokens)), answer.tokens]
        np.testing.assert_allclose(answer.log_probabilities, expected, atol=1e-4)


def test_beams_over_pictures_in_the_sequence(tmp_path):
    model, processor = llava(tmp_path, seed=3)
    vlm = load(tmp_path)
    many = [(TEXT, [picture(1, 30, 44)]), (TWO, [picture(n, 20 + n, 40) for n in range(3)])]
    expected = [their_answer(model, asked(processor, [line], pictures), NEW, num_beams=3)[0] for line, pictures in many]
    answers = vlm.answer([verbatim(vlm, *one) for one in many], max_new_tokens=NEW, beams=3)
    assert [answer.tokens for answer in answers] == expected


@pytest.mark.parametrize("mesh", [thorough(None), "data=2,tensor=4"])
def test_beams_over_gated_cross_attention(tmp_path, mesh):
    model, processor = idefics_folder(tmp_path, seed=2)
    vlm = load(tmp_path, mesh)
    expected = [their_answer(model, processor(text=[listed(*prompt)]), NEW, num_beams=3)[0] for prompt in PROMPTS]
    answers = vlm.answer([verbatim(vlm, *prompt) for prompt in PROMPTS], max_new_tokens=NEW, beams=3)
    assert [answer.tokens for answer in answers] == expected


def test_the_checkpoints_own_settings(tmp_path):
    model, words = language_model(tmp_path)
    model.generation_config.update(
        num_beams=3, length_penalty=0.0, early_stopping=True, repetition_penalty=1.3, max_new_tokens=7
    )
    model.save_pretrained(tmp_path)
    vlm = load(tmp_path)
    wanted = Settings(beams=3, length_penalty=0.0, early_stopping=True, repetition_penalty=1.3, max_new_tokens=7)
    assert vlm.settings() == wanted and vlm.settings(beams=1) == dataclasses.replace(wanted, beams=1)
    with torch.no_grad():
        out = model.generate(**words(TEXTS[0], return_tensors="pt"))[0]
    tokens = vlm.answer([verbatim(vlm, TEXTS[0])])[0].tokens
    assert tokens == until_an_end(out[len(words(TEXTS[0])["input_ids"]) :].tolist())


def test_settings_that_are_not_implemented_are_told(tmp_path, caplog):
    model, _ = language_model(tmp_path)
    model.generation_config.update(num_beams=3, do_sample=True, top_k=7, no_repeat_ngram_size=2)
    model.save_pretrained(tmp_path)
    assert load(tmp_path).settings() == Settings(temperature=1.0, top_k=7)
    assert "no_repeat_ngram_size=2: not implemented" in caplog.text


@pytest.mark.parametrize(
    ("said", "match"),
    [
        (dict(num_beams=0), r"num_beams=0 \(expected a whole number from 1"),
        (dict(max_new_tokens=10**12), r"max_new_tokens=1000000000000 \(expected"),
        (dict(repetition_penalty="high"), r'repetition_penalty="high" \(expected a number above 0'),
        (dict(length_penalty=float("nan")), "is damaged: it has the number nan"),
        (dict(eos_token_id=[1, -1]), r"eos_token_id=\[1, -1\] \(expected"),
        (dict(do_sample=True, temperature=0), "temperature=0 with do_sample=true: expected a number above 0"),
        (dict(do_sample=True, top_p=0.0), "top_p=0.0 with do_sample=true: expected a number above 0"),
        (dict(do_sample="yes"), r'do_sample="yes" \(expected true or false or null\)'),
    ],
    ids=str,
)
def test_settings_that_cannot_be(text, tmp_path, said, match):
    _, words, vlm = text
    config, tokenizer = AutoConfig.from_pretrained(vlm.checkpoint.path), words
    (tmp_path / "generation_config.json").write_text(json.dumps(said))
    with pytest.raises(PublishedError, match=f"generation_config.json.*{match}"):
        _generation(tmp_path, config, tokenizer)


def test_the_longest_text_is_named(text, tmp_path, caplog):
    _, words, vlm = text
    config = AutoConfig.from_pretrained(vlm.checkpoint.path)
    path = tmp_path / "generation_config.json"
    path.write_text(json.dumps(dict(max_length=4096)))
    assert _generation(tmp_path, config, words)[1] == Settings()
    assert "max_length=4096 counts the prompt too and is not implemented: answers end after max_new_tokens=64" in caplog.text
    caplog.clear()
    path.write_text(json.dumps(dict(max_length=4096, max_new_tokens=7, temperature=0.0)))  # which is not read without sampling
    assert _generation(tmp_path, config, words)[1] == Settings(max_new_tokens=7)
    assert not caplog.text


def test_what_does_not_go_together(text):
    vlm = text[2]
    with pytest.raises(RequestError, match="beams=2: beam search neither samples nor knows stop strings"):
        vlm.settings(beams=2, temperature=0.5)
    with pytest.raises(RequestError, match="beams=2: beam search neither"):
        vlm.settings(beams=2, stop=("x",))
    with pytest.raises(RequestError, match="the best answer is known at the end only"):
        list(vlm.stream("a cat", beams=2))
    with pytest.raises(RequestError, match=r"repetition_penalty=0: expected more than 0"):
        vlm.settings(repetition_penalty=0)
