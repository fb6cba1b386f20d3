"""Rows of several conversations, with pictures of several shapes: each is what PyTorch's model reads of it alone.

Training's side goes from a JSON-lines file through the token store and packing to the model; PyTorch's from the same texts and
files through transformers' own processor.
"""

import dataclasses

import jax
import numpy as np
import pytest
import torch
from published_families import FAMILIES, conversations, packed, run_config, segments_of, write_conversations
from tiny_tokenizers import PAD
from torch_helpers import compare, saved_state

from tests.tiny import mesh_of, thorough
from vlm_jax.interop.engine import to_ours
from vlm_jax.interop.published import open_published
from vlm_jax.models.vlm import VisionLanguageModel
from vlm_jax.paths import by_path
from vlm_jax.training.sets import check_data
from vlm_jax.training.step import Trainer

SEED = 2
AKIN = ("llava", "idefics2_split", "openflamingo_all_previous")  # to another family, in how a row is read


def prepared(folder, family, **changes):
    """(PyTorch's model, the conversations' prompts as its inputs, the end token, the run)."""
    pictures = folder / "data"
    pictures.mkdir()
    model, processor = family.made(folder / "published", SEED)
    many = conversations(pictures, family.said)
    lines = write_conversations(pictures, many)
    run = run_config(folder / "published", lines, family.sizes, fusion=family.fusion, **changes)
    check_data(run)
    prompts = [family.prompt(processor, messages[:-1]) for messages in many]
    return model, prompts, processor.tokenizer.convert_tokens_to_ids(family.ends[-1]), run


def found(prompts, end, batch, row, places):
    """Which conversation it is, and what stands behind its prompt: the last answer, without its end."""
    tokens = batch.tokens[row, places].tolist()
    fits = [number for number, one in enumerate(prompts) if tokens[: one["input_ids"].shape[1]] == one["input_ids"][0].tolist()]
    assert len(fits) == 1, "what training reads of a prompt is not what transformers makes of it"
    length = prompts[fits[0]]["input_ids"].shape[1]
    assert batch.weights[row, places[length - 1 :]].all(), "the whole answer is learned, and its end"
    assert batch.targets[row, places[length - 1 :]].tolist() == [*tokens[length:], end]
    return fits[0], tokens[length:]


@pytest.mark.parametrize("name", [thorough(name) if name in AKIN else name for name in FAMILIES])
def test_logits_of_packed_rows(tmp_path, name):
    family = FAMILIES[name]
    model, prompts, end, run = prepared(tmp_path, family, steps=2)
    params = open_published(tmp_path / "published", pickles=True).load_params(mesh_of(1, 1, 1))
    apply = jax.jit(VisionLanguageModel(run.model).apply)
    for batches in packed(run, tmp_path / "run"):
        seen = set()
        for batch in batches:
            ours = np.asarray(apply({"params": params}, batch))
            for row, places in segments_of(batch):
                number, answer = found(prompts, end, batch, row, places)
                with torch.no_grad():
                    compare(ours[row, places], family.logits(model, prompts[number], answer))
                seen.add(number)
        assert seen == set(range(len(prompts)))
        assert max(batch.media_first.max() for batch in batches) > 1, "pictures of several conversations in a row"


@pytest.mark.parametrize("name", [thorough("llava_next"), "idefics2", "paligemma"])
def test_loss_and_gradients_of_packed_rows(tmp_path, name):
    """The mean over the learned tokens of all conversations, of which PyTorch reads one after the other."""
    family = FAMILIES[name]
    model, prompts, end, run = prepared(tmp_path, family, steps=1)
    run = dataclasses.replace(run, optimizer=dataclasses.replace(run.optimizer, rules=()), remat="full")
    batch = packed(run, tmp_path / "run")[1][0]
    mesh = mesh_of(1, 1, 1)
    published = open_published(tmp_path / "published")
    with jax.set_mesh(mesh):
        trainer = Trainer(run, mesh)
        state = trainer.state_of(published.load_params(mesh))
        sums, gradients = jax.jit(trainer.gradients)(state.trained, state.frozen, trainer.put(batch))
    total = 0.0
    for row, places in segments_of(batch):
        number, answer = found(prompts, end, batch, row, places)
        logits = family.logits(model, prompts[number], answer)
        targets, weights = (torch.tensor(getattr(batch, field)[row, places]) for field in ("targets", "weights"))
        losses = torch.nn.functional.cross_entropy(logits, targets.long(), reduction="none")
        loss = (losses * weights).sum() / float(batch.weights.sum())
        loss.backward()
        total += loss.item()
    np.testing.assert_allclose(float(trainer.objective.means(sums)["loss"]), total, rtol=1e-5)
    for parameter in model.parameters():
        # Layers behind the one whose features are read have none.
        parameter.data = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
    theirs, ours = (by_path(tree) for tree in (to_ours(saved_state(model), published.tables[0], gradients), gradients))
    for tree in (theirs, ours):
        # PyTorch's embeddings have no gradient for the padding token, which a text may say.
        tree["language/embedding"] = np.delete(tree["language/embedding"], PAD, axis=0)
    largest = max(np.abs(leaf).max() for leaf in theirs.values())
    for part in dict.fromkeys(path.split("/")[0] for path in theirs):
        of_part = [np.abs(leaf).max() for path, leaf in theirs.items() if path.startswith(f"{part}/")]
        assert max(of_part) > 1e-3 * largest, f"no gradient worth comparing in {part}"
    worst = max((np.abs(leaf - theirs[path]).max(), path) for path, leaf in ours.items())
    print(f"loss {total:.4f}, largest difference of gradients {worst[0] / largest:.1e} of {largest:.1e}, in {worst[1]}")
    assert worst[0] < 1e-4 * largest, worst[1]
