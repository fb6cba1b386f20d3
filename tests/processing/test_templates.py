"""The named chat templates against LLaVA's own texts, and what is learned of them."""

import json

import numpy as np
import pytest
from references import llava
from tiny_tokenizers import EOS

from vlm_jax.errors import RequestError
from vlm_jax.interop.published import open_published
from vlm_jax.processing.conversation import Medium, Text, Turn, assistant, user
from vlm_jax.processing.layout import ENDS
from vlm_jax.processing.templates import TEMPLATES, named_template

CHAT = (user(Medium(0), Text("What is this?")), assistant("A cat."), user(Text("Colour?")), assistant("Black."))
SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, and polite "
    "answers to the user's questions."
)
GOLDEN = {
    "vicuna_v1": f"{SYSTEM} USER: <image>\nWhat is this? ASSISTANT: A cat.</s>USER: Colour? ASSISTANT:",
    "llama_2": "<s>[INST] <image>\nWhat is this? [/INST] A cat. </s><s>[INST] Colour? [/INST]",
    "mistral": "<s>[INST] <image>\nWhat is this? [/INST]A cat.</s>[INST] Colour? [/INST]",
    "chatml": "<|im_start|>user\n<image>\nWhat is this?<|im_end|>\n<|im_start|>assistant\nA cat.<|im_end|>\n"
    "<|im_start|>user\nColour?<|im_end|>\n<|im_start|>assistant\n",
    "plain": "<image>A cat.\n",
}


@pytest.fixture
def processor(tmp_path):
    llava(tmp_path, "prepend")
    return open_published(tmp_path).processor


@pytest.mark.parametrize("name", TEMPLATES)
def test_golden_texts(processor, name):
    processor.template = named_template(name)
    assert processor.rendered(CHAT[:-1], ask=True) == GOLDEN[name]


@pytest.mark.parametrize("name", TEMPLATES)
def test_answers_and_their_ends_are_learned(processor, name):
    processor.template = named_template(name)
    if name == "chatml":  # its end token is one of the checkpoints that use it
        wrapped = processor.tokenizer.hf_tokenizer
        wrapped.add_special_tokens({"additional_special_tokens": ["<|im_end|>"]})
        processor.ends = {wrapped.convert_tokens_to_ids("<|im_end|>")}
        processor.vocabulary = None
    whole, prompt = processor.write(CHAT), processor.write(CHAT[:-1], open=True)
    np.testing.assert_array_equal(whole.tokens[: len(prompt.tokens)], prompt.tokens)
    np.testing.assert_array_equal(whole.flags[: len(prompt.tokens)], prompt.flags)
    learned = whole.tokens[(whole.flags & 1) > 0].tolist()
    text = processor.tokenizer.decode(learned).replace(" ", "")
    end = {"chatml": "<|im_end|>"}.get(name, "</s>")
    # Where the template writes no end token behind the first answer, the model learns all the same to end there.
    written = "" if name == "plain" else end
    assert text == f"Acat.{written}Black.{end}"
    assert ((whole.flags & ENDS) > 0).sum() == (name == "plain")
    assert whole.tokens[-1] == (EOS if name != "chatml" else min(processor.ends))


def test_a_system_turn_takes_the_place_of_the_usual_one(processor):
    processor.template = named_template("vicuna_v1")
    text = processor.rendered((Turn("system", (Text("Be short."),)), *CHAT[:1]), ask=True)
    assert text == "Be short. USER: <image>\nWhat is this? ASSISTANT:"


def test_errors_name_what_to_change(processor):
    with pytest.raises(RequestError, match=r"data\.template='vicuna': expected one of vicuna_v1, llama_2"):
        named_template("vicuna")
    processor.template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(RequestError, match="refuses turns of user: roles must alternate"):
        processor.write(CHAT[:1], open=True)
    processor.template = "{% for m in messages %}{{ m['content'][-1]['text'][1:] }}{% endfor %}"
    with pytest.raises(RequestError, match="changes what the assistant says"):
        processor.write(CHAT[2:])
    with pytest.raises(RequestError, match="has 1 pictures and the chat template writes 0 of '<image>'"):
        processor.write(CHAT[:1], open=True)
    with pytest.raises(RequestError, match="a text says '<image>', which marks an image"):
        processor.write((user(Text("an <image> here")),), open=True)


def test_the_template_is_kept_with_the_run_and_read_by_transformers(tmp_path):
    from transformers import AutoProcessor

    from vlm_jax.config import DataConfig, JsonLinesConfig
    from vlm_jax.training.processors import build_processor, run_processor

    llava(tmp_path / "published", "prepend")
    source = JsonLinesConfig(train="", eval="")
    data = dict(source=source, processor=str(tmp_path / "published"), image_size=16, rows=1, tokens=8, images=1)
    config = DataConfig(**data, template="vicuna_v1")
    (tmp_path / "run").mkdir()
    made = build_processor(config, [], tmp_path / "run")
    assert made.template == TEMPLATES["vicuna_v1"] and run_processor(config, tmp_path / "run").fingerprint == made.fingerprint
    theirs = AutoProcessor.from_pretrained(tmp_path / "run" / "processor", backend="pil")
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is this?"}]}]
    text = theirs.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert text == f"{SYSTEM} USER: <image>\nWhat is this? ASSISTANT:"
    (tmp_path / "other").mkdir()
    other = build_processor(DataConfig(**data), [], tmp_path / "other")
    assert other.fingerprint != made.fingerprint
    assert json.loads((tmp_path / "run" / "processor" / "config.json").read_text())["model_type"] == "llava"


def test_captions_end_in_a_line_break(tmp_path):
    """LLaVA's first stage: `<image>`, the caption, a line break, and no end token."""
    from vlm_jax.config import DataConfig, JsonLinesConfig
    from vlm_jax.training.processors import build_processor

    theirs = llava(tmp_path / "published", "prepend")
    source = JsonLinesConfig(train="", eval="")
    data = dict(source=source, processor=str(tmp_path / "published"), image_size=16, rows=1, tokens=8, images=1)
    processor = build_processor(DataConfig(**data, template="plain"), [], tmp_path)
    written = processor.write(CHAT[:2])
    assert written.tokens.tolist() == theirs.tokenizer("<image>A cat.\n")["input_ids"]
    line = theirs.tokenizer("A cat.\n")["input_ids"][-1]
    assert processor.ends == {line} and processor.spread.end_id == line != EOS
    assert processor.tokenizer.decode(written.tokens[(written.flags & 1) > 0].tolist()).strip(" ") == "A cat.\n"
