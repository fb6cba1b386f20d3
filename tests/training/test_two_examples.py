"""What was trained is what is asked: two answers learned by heart come out of the run, and out of PyTorch after the export."""

import numpy as np
import pytest
import torch
from published_families import ANSWERS, FAMILIES, loaded, tuned
from transformers import AutoProcessor

import vlm_jax
from tests.tiny import thorough


@pytest.mark.parametrize("name", [thorough("llava_next"), thorough("idefics2"), "paligemma"])
def test_two_examples(tmp_path, runs_on_one_device, name):
    family = FAMILIES[name]
    done = tuned(tmp_path, family)
    vlm = vlm_jax.load(done.run)
    model = loaded(done.exported)
    processor = AutoProcessor.from_pretrained(done.exported, backend="pil")
    losses, own = [], []
    for messages, answer in zip(done.questions, ANSWERS, strict=True):
        inputs = family.prompt(processor, messages)
        with torch.no_grad():
            made = model.generate(**inputs, max_new_tokens=24, do_sample=False)
            theirs = made[0, inputs["input_ids"].shape[1] :]
            logits = family.logits(model, inputs, theirs[:-1].tolist())[-len(theirs) :]
        losses.append(torch.nn.functional.cross_entropy(logits, theirs, reduction="none"))
        assert processor.tokenizer.decode(theirs[:-1]).strip() == answer
        assert processor.tokenizer.convert_ids_to_tokens(theirs[-1].item()) == family.ends[-1]
        image, question = (part[part["type"]] for part in messages[0]["content"])
        assert vlm.generate(question, images=[image], max_new_tokens=24) == answer
        assert vlm.chat(messages, max_new_tokens=24) == answer
        [ours] = vlm.answer([vlm.request(question, [image])], max_new_tokens=24)
        assert ours.tokens == theirs.tolist() and ours.finish_reason == "end_token"
        own += ours.log_probabilities
    # What the run's evaluation measured, of the same texts and files.
    np.testing.assert_allclose(torch.cat(losses).mean().item(), done.loss, rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(-np.mean(own), done.loss, rtol=1e-3, atol=1e-5)
    print(f"loss {done.loss:.6f}, PyTorch's {torch.cat(losses).mean():.6f}, of what is generated {-np.mean(own):.6f}")
