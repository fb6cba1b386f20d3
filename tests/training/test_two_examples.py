"""What was trained is what is asked: two answers learned by heart come out of the run, and out of PyTorch after the export."""

import pytest
import torch
from published_families import FAMILIES, loaded, tuned
from transformers import AutoProcessor

import vlm_jax

# IDEFICS2's generation_config.json has both of its end tokens.
ENDS = {"idefics2": ["</s>", "<end_of_utterance>"]}


@pytest.mark.parametrize("name", ["llava", "llava_next", "idefics", "idefics2", "paligemma"])
def test_two_examples(tmp_path, name):
    family = FAMILIES[name]
    done = tuned(tmp_path, family, ENDS.get(name, ()))
    vlm = vlm_jax.load(done.run)
    model = loaded(done.exported)
    processor = AutoProcessor.from_pretrained(done.exported, backend="pil")
    for messages, answer in zip(done.questions, done.answers, strict=True):
        inputs = family.prompt(processor, messages)
        with torch.no_grad():
            made = model.generate(**inputs, max_new_tokens=24, do_sample=False)
        theirs = made[0, inputs["input_ids"].shape[1] :].tolist()
        assert processor.tokenizer.decode(theirs[:-1]).strip() == answer
        assert theirs[-1] in processor.tokenizer.convert_tokens_to_ids(ENDS.get(name, ["</s>"]))
        picture, question = (part[part["type"]] for part in messages[0]["content"])
        assert vlm.generate(question, images=[picture], max_new_tokens=24) == answer
        assert vlm.chat(messages, max_new_tokens=24) == answer
        [ours] = vlm.answer([vlm.request(question, [picture])], max_new_tokens=24)
        assert ours.tokens == theirs and ours.finish_reason == "end_token"
