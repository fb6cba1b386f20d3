"""One update of LLaVA-1.5's stages beside PyTorch: the loss and the gradient of everything that is trained.

Both sides start from LLaVA's own JSON and the pictures' files: ours through the token store, packing and the recipe's rules;
PyTorch's through transformers' processor, one conversation after the other, with labels masked as LLaVA's `preprocess` does.
"""

import dataclasses
import json

import jax
import numpy as np
import pytest
import torch
from folders import picture
from peft import PeftModel
from PIL import Image
from published_families import FAMILIES, loaded, packed, run_config
from torch_helpers import saved_state

from configs import llava15_stage1, llava15_stage2
from tests.tiny import mesh_of
from vlm_jax.config import LoraConfig, RunConfig
from vlm_jax.config_dict import from_config_dict
from vlm_jax.interop.engine import abstract_params, to_ours
from vlm_jax.interop.peft_read import read_adapter
from vlm_jax.interop.peft_write import write_adapter
from vlm_jax.interop.published import open_published
from vlm_jax.layers.lora import merged
from vlm_jax.paths import by_path, nested
from vlm_jax.sharding import boxed_params
from vlm_jax.training.sets import check_data
from vlm_jax.training.step import Trainer

SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, and polite "
    "answers to the user's questions. "
)
PICTURES = ((30, 18), (15, 40), (16, 16))
CAPTIONS = ("two dogs in the park", "a red shape on the left, 3.14", "a cat sits on the mat.")
TALKS = (
    (("what color is the shape?", "red"), ("and the cat?", "it sits on the mat.")),
    (("how many are there?", "maybe 7, or 1024"),),
    (("is it a cat?", "Yes!"), ("two?", "No: one"), ("where?", "in the park")),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stages")
    FAMILIES["llava"].made(folder / "published", 3)
    for number, size in enumerate(PICTURES):
        picture(number, *size).save(folder / f"{number}.png")
    return folder


def record(number, talk):
    said = [dict(zip(("from", "value"), pair, strict=True)) for q, a in talk for pair in (("human", q), ("gpt", a))]
    said[0]["value"] = f"<image>\n{said[0]['value']}"
    return dict(id=str(number), image=f"{number}.png", conversations=said)


def plain(number):
    """What is read, and the part of it that is learned."""
    return [("<image>", False), (f"{CAPTIONS[number]}\n", True)]


def vicuna(number):
    parts = [(SYSTEM, False)]
    for turn, (question, answer) in enumerate(TALKS[number]):
        parts += [(f"USER: {'' if turn else '<image>' + chr(10)}{question} ASSISTANT:", False), (f" {answer}</s>", True)]
    return parts


def squared(image):
    """`expand2square` of LLaVA: centred on the mean colour of CLIP."""
    side = max(image.size)
    canvas = Image.new("RGB", (side, side), (122, 116, 104))
    canvas.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return canvas


def their_inputs(processor, number, parts, image):
    """The model's inputs, made by transformers, and the labels: -100 where nothing is learned."""
    text = "".join(part for part, _ in parts)
    inputs = processor(images=[image], text=[text], return_tensors="pt")
    spread = [(part.replace("<image>", "<image>" * 16), learned) for part, learned in parts]
    read = processor.tokenizer("".join(part for part, _ in spread), return_offsets_mapping=True)
    assert read["input_ids"] == inputs["input_ids"][0].tolist()
    spans, at = [], 0
    for part, learned in spread:
        spans += [(at, at + len(part))] if learned else []
        at += len(part)
    inside = lambda begin, end: any(begin < stop and end > start for start, stop in spans)
    wanted = [inside(*offsets) for offsets in read["offset_mapping"]]
    labels = torch.where(torch.tensor([wanted]), inputs["input_ids"], -100)
    return inputs, labels


def stage(folder, recipe, talks, *, adapters=()):
    """A run with the recipe's rules, and a batch with each conversation once."""
    lines = folder / f"{recipe.optimizer.lr}.json"
    lines.write_text(json.dumps([record(number, talk) for number, talk in enumerate(talks)]))
    sizes = dict(rows=4, tokens=384, images=4, template=recipe.data.template, pad_to_square=recipe.data.pad_to_square)
    run = run_config(folder / "published", lines, sizes, steps=1, adapters=adapters)
    rules = tuple(dataclasses.replace(rule, frozen_dtype="float32") for rule in recipe.optimizer.rules)
    run = dataclasses.replace(run, optimizer=dataclasses.replace(recipe.optimizer, rules=rules))
    check_data(run)
    return run, packed(run, folder / f"run{recipe.optimizer.lr}")[0][0]


def ours(trainer, state, batch):
    sums, gradients = jax.jit(trainer.gradients)(state.trained, state.frozen, trainer.put(batch))
    return float(trainer.objective.means(sums)["loss"]), by_path(jax.device_get(gradients))


def theirs(model, processor, folder, parts_of, *, square=False):
    """The mean loss over all learned tokens; the gradients are left in the parameters."""
    total, count = 0.0, 0
    for number in range(len(PICTURES)):
        image = Image.open(folder / f"{number}.png")
        inputs, labels = their_inputs(processor, number, parts_of(number), squared(image) if square else image)
        logits = model(**inputs).logits[0, :-1]
        loss = torch.nn.functional.cross_entropy(logits, labels[0, 1:], ignore_index=-100, reduction="sum")
        loss.backward()
        total, count = total + loss.item(), count + int((labels[0, 1:] >= 0).sum())
    for parameter in model.parameters():
        parameter.data = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad / count
    return total / count


def compare(gradients, reference, loss, expected):
    """Every tensor to 1e-4 of its own largest number."""
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    worst = 0.0
    for path, leaf in gradients.items():
        largest = np.abs(reference[path]).max()
        assert largest > 1e-7, f"no gradient worth comparing of {path}"
        worst = max(worst, float(np.abs(leaf - reference[path]).max() / largest))
        np.testing.assert_allclose(leaf, reference[path], rtol=0, atol=1e-4 * largest, err_msg=path)
    print(f"loss {loss:.5f}, {len(gradients)} tensors, largest relative difference {worst:.1e}")


def processor_of(folder):
    from transformers import AutoProcessor

    return AutoProcessor.from_pretrained(folder / "published", backend="pil")


@pytest.mark.parametrize(
    ("name", "recipe", "talks", "parts_of", "square", "trained"),
    [
        ("one", llava15_stage1, [[("what is this?", caption)] for caption in CAPTIONS], plain, False, {"connector"}),
        ("two", llava15_stage2, TALKS, vicuna, True, {"connector", "language"}),
    ],
)
def test_stage(folder, name, recipe, talks, parts_of, square, trained):
    run, batch = stage(folder, from_config_dict(RunConfig, recipe.get_config("7b")), talks)
    published, mesh = open_published(folder / "published"), mesh_of(1, 1, 1)
    with jax.set_mesh(mesh):
        trainer = Trainer(run, mesh)
        loss, gradients = ours(trainer, trainer.state_of(published.load_params(mesh)), batch)
    assert {path.split("/")[0] for path in gradients} == trained
    model = loaded(folder / "published")
    expected = theirs(model, processor_of(folder), folder, parts_of, square=square)
    reference = by_path(to_ours(saved_state(model), published.tables[0], abstract_params(trainer.model)))
    compare(gradients, reference, loss, expected)


def test_lora_beside_peft(folder):
    """`finetune_lora.sh` at rank 3: adapters with random numbers, the projector trained whole."""
    recipe = from_config_dict(RunConfig, llava15_stage2.get_config("7b,lora"))
    entry = dataclasses.replace(recipe.adapters[0], rank=3, alpha=6.0, dropout=0.0)
    assert isinstance(entry, LoraConfig)
    run, batch = stage(folder, recipe, TALKS, adapters=(entry,))
    published, mesh = open_published(folder / "published"), mesh_of(1, 1, 1)
    boxes, rng = by_path(boxed_params(published_module(run))), np.random.default_rng(0)
    with jax.set_mesh(mesh):
        trainer = Trainer(run, mesh)
        state = trainer.state_of(published.load_params(mesh))
        random = lambda path, x: 0.2 * rng.standard_normal(x.shape, np.float32) if "/lora/" in path else x
        state = dataclasses.replace(state, trained=nested({p: random(p, x) for p, x in by_path(state.trained).items()}))
        loss, gradients = ours(trainer, state, batch)
    assert {path.split("/")[0] for path in gradients} == {"connector", "language"}
    projector = [path for path in gradients if "/lora/" not in path]
    write_adapter(folder / "adapter", "default", state.params, published.tables[0], boxes, also=projector)
    model = PeftModel.from_pretrained(loaded(folder / "published"), folder / "adapter", is_trainable=True).eval()
    expected = theirs(model, processor_of(folder), folder, vicuna, square=True)
    model.save_pretrained(folder / "gradients")
    reference = by_path(read_adapter(folder / "gradients", "default", published.tables, boxes))
    assert gradients.keys() == {path for path in reference if not path.endswith("scale")}
    compare(gradients, reference, loss, expected)
    assert not any("/lora/" in path for path in by_path(merged(state.params)))


def published_module(run):
    from vlm_jax.config.register import module_of

    return module_of(run.model)(run.model)
