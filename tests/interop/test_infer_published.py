"""`infer.py --checkpoint=FOLDER` with no other flag answers what `generate` answers in PyTorch, for every family that sees."""

import sys
from pathlib import Path

import pytest
import torch
from folders import EOS, picture
from test_idefics import idefics_folder
from test_idefics2 import idefics2
from test_llava import llava, llava_next
from test_paligemma import paligemma

sys.path.insert(0, str(Path(__file__).parents[2]))
import infer

PROMPT, NEW = "what color is the shape?", 64


def in_chat(processor, image):
    content = [{"type": "image"}, {"type": "text", "text": PROMPT}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False)
    return processor(images=[image], text=text, return_tensors="pt")


def listed(processor, image):
    return processor(text=[[image, PROMPT]])


def in_front(processor, image):
    inputs = processor(images=[image], text=f"<image>{PROMPT}", return_tensors="pt")
    inputs.pop("labels")
    return inputs


def one_list(processor, image):
    content = [{"type": "image"}, {"type": "text", "text": PROMPT}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False)
    return processor(images=[[image]], text=[text], return_tensors="pt")


FAMILIES = {
    "idefics2": (idefics2, one_list),
    "llava": (llava, in_chat),
    "llava_next": (llava_next, in_chat),
    "idefics": (idefics_folder, listed),
    "paligemma": (paligemma, in_front),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_text_is_theirs(tmp_path, capsys, family):
    make, inputs_of = FAMILIES[family]
    # The first seed whose answer ends by itself, if one does: the end token is then seen too.
    for seed in range(1, 6):
        model, processor = make(tmp_path / str(seed), seed=seed)
        image = picture(seed, 40, 30)
        image.save(tmp_path / "a.png")
        inputs = inputs_of(processor, image)
        with torch.no_grad():
            out = model.generate(**inputs, max_new_tokens=NEW, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        if EOS in out:
            break
    expected = processor.tokenizer.decode(out, skip_special_tokens=True).strip()
    capsys.readouterr()
    command = [f"--checkpoint={tmp_path / str(seed)}", f"--image={tmp_path / 'a.png'}", f"--prompt={PROMPT}", "--no-stream"]
    assert infer.main(command) == 0
    assert capsys.readouterr().out == f"{expected}\n"
