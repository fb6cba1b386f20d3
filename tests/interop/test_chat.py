"""`Vlm.chat` of published checkpoints against transformers: several turns, a picture in the second, templates that refuse."""

import pytest
import torch
from folders import load, picture, saved, their_answer, tokenizer
from test_idefics2 import idefics2
from test_llava import llava, llava_next
from transformers import LlamaConfig, LlamaForCausalLM

from tests.tiny import thorough
from vlm_jax.errors import RequestError
from vlm_jax.generation.request import chat_request

NEW = 10
TURNS_ONLY = (
    "{{ bos_token }}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{{ '[' + message['role'] + '] ' + message['content'] + ' ' }}{% endfor %}"
)


def text(said):
    return {"type": "text", "text": said}


def chat(*pictures):
    """Two pictures: one in the second turn of the user, one in the third."""
    first, second = ({"type": "image", "image": one} for one in pictures)
    return [
        {"role": "user", "content": [text("what color is the shape?")]},
        {"role": "assistant", "content": [text("red")]},
        {"role": "user", "content": [first, text("two dogs?")]},
        {"role": "assistant", "content": [text("a cat")]},
        {"role": "user", "content": [second, text("and now?")]},
    ]


@pytest.mark.parametrize("make", [thorough(llava), llava_next, thorough(idefics2)])
def test_answers_of_several_turns(tmp_path, make):
    model, processor = make(tmp_path, seed=3)
    vlm = load(tmp_path)
    pictures = [picture(1, 30, 44), picture(2, 20, 17)]
    messages = chat(*pictures)
    rendered = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    images = [pictures] if make is idefics2 else pictures
    expected = their_answer(model, processor(images=images, text=[rendered], return_tensors="pt"), NEW)[0]
    ours, swapped = vlm.answer([chat_request(messages), chat_request(chat(*pictures[::-1]))], max_new_tokens=NEW)
    assert ours.tokens == expected
    assert vlm.chat(messages, max_new_tokens=NEW) == processor.tokenizer.decode(expected, skip_special_tokens=True).strip()
    assert abs(ours.log_probabilities[0] - swapped.log_probabilities[0]) > 1e-3


def language_model(folder, template):
    words = tokenizer(chat_template=template)
    sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
    return saved(folder, LlamaForCausalLM(LlamaConfig(vocab_size=len(words), **sizes)), words), words


def test_a_language_model_alone(tmp_path):
    model, words = language_model(tmp_path, TURNS_ONLY)
    vlm = load(tmp_path)
    messages = [
        {"role": "user", "content": "a cat"},
        {"role": "assistant", "content": "yes"},
        {"role": "user", "content": "red?"},
    ]
    inputs = words.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    with torch.no_grad():
        expected = their_answer(model, inputs, NEW)[0]
    assert vlm.chat(messages, max_new_tokens=NEW) == words.decode(expected, skip_special_tokens=True).strip()
    with pytest.raises(RequestError, match="turns of user, user: roles must alternate user/assistant"):
        vlm.chat([messages[0], messages[2]])
    with pytest.raises(RequestError, match="turns of system, user: roles must alternate user/assistant"):
        vlm.chat([{"role": "system", "content": "be brief"}, messages[2]])
    with pytest.raises(RequestError, match="this model is a language model alone: leave them out"):
        vlm.chat([{"role": "user", "content": [{"type": "image", "image": picture(1, 20, 20)}]}])


def test_a_template_that_leaves_a_picture_out(tmp_path):
    """It would be read as a question without the picture."""
    llava(tmp_path, chat="{% for message in messages %}{{ message['content'][-1]['text'] }}{% endfor %}")
    vlm = load(tmp_path)
    assert vlm.chat([{"role": "user", "content": "red?"}], max_new_tokens=2)
    with pytest.raises(RequestError, match="the conversation has 1 pictures and the chat template writes 0 of '<image>'"):
        vlm.chat([{"role": "user", "content": [{"type": "image", "image": picture(1, 20, 20)}, text("red?")]}])
