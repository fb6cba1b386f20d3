"""DPO beside TRL's trainer on a tiny LLaVA, from the same texts and picture files: log-probabilities, losses, all gradients.

TRL tokenises an answer alone, so the tokenizer is a byte-level one: LLaMA's would put a space in front of the answer that is
not in the conversation.
"""

import copy
import dataclasses
import json

import jax
import numpy as np
import pytest
import references
import torch
from datasets import Dataset
from folders import picture
from PIL import Image
from tiny_tokenizers import PAD
from torch_helpers import randomised, saved_state
from trl import DPOConfig, DPOTrainer

from tests.tiny import mesh_of
from tests.training.published_families import loaded, packed, run_config
from vlm_jax.config import PreferenceConfig
from vlm_jax.interop.engine import to_ours
from vlm_jax.interop.published import open_published
from vlm_jax.paths import by_path
from vlm_jax.training.objectives.preference import Preference
from vlm_jax.training.sets import check_data
from vlm_jax.training.step import Trainer

CHAT = (
    "{{ bos_token }}{% for message in messages %}{{ message['role'].upper() + ':' }}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% else %} {{ part['text'] }}{% endif %}{% endfor %}"
    "{% if message['role'] == 'assistant' %}</s>{% else %} {% endif %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
PAIRS = (  # question, chosen, rejected
    ("what color is it?", "red", "it is blue, I think"),
    ("is there a dog?", "no, a cat sits on the mat", "yes"),
    ("how many?", "two dogs", "three dogs"),
)
BETA = 0.3


def records(folder):
    """TRL's form, with files; the sizes of the pictures differ."""
    out = []
    for number, (question, *answers) in enumerate(PAIRS):
        picture(number, 20 + 9 * number, 33 - 7 * number).save(folder / f"{number}.png")
        chosen, rejected = ([dict(role="assistant", content=answer)] for answer in answers)
        prompt = [dict(role="user", content=question)]
        out.append(dict(images=[f"{number}.png"], prompt=prompt, chosen=chosen, rejected=rejected))
    (folder / "pairs.jsonl").write_text("".join(json.dumps(record) + "\n" for record in out))
    return out


def theirs(folder, model, reference, processor, given, **settings):
    """TRL's loss of a batch of all pairs and its metrics; the model has the gradients."""
    args = DPOConfig(
        output_dir=str(folder / "trl"),
        use_cpu=True,
        bf16=False,
        report_to="none",
        max_length=None,
        beta=BETA,
        disable_tqdm=True,
        **settings,
    )
    data = Dataset.from_list(copy.deepcopy(given))
    trainer = DPOTrainer(model, reference, args, train_dataset=data, processing_class=processor)
    model.eval()  # the weights are read, nothing is dropped
    opened = [record | dict(images=[Image.open(folder / record["images"][0])]) for record in copy.deepcopy(given)]
    loss = trainer.compute_loss(model, trainer.data_collator(opened))
    loss.backward()
    return loss.item(), {name: float(np.mean(values)) for name, values in trainer._metrics["eval"].items() if values}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """The folder of a model and its pairs, and the folder of another one, the reference."""
    folder = tmp_path_factory.mktemp("dpo")
    for number, name in enumerate(("published", "reference")):
        processor = references.llava(folder / name, "bytes", CHAT)
        randomised(loaded(folder / name), number).save_pretrained(folder / name)
    return folder, processor, records(folder)


@pytest.fixture(scope="module")
def ours(models):
    """Our trainer and the packed batch of all pairs; of them the sums, the gradients, and both models' log-probabilities."""
    folder, _, _ = models
    sizes = dict(rows=1, tokens=320, images=4, pairs=True, share_prefix=True)
    run = run_config(folder / "published", folder / "pairs.jsonl", sizes, steps=1, objective=PreferenceConfig(beta=BETA))
    run = dataclasses.replace(run, optimizer=dataclasses.replace(run.optimizer, rules=()))
    check_data(run)
    batch = packed(run, folder / "run")[0][0]
    mesh = mesh_of(1, 1, 1)
    params, reference = (open_published(folder / name).load_params(mesh) for name in ("published", "reference"))
    trainer = Trainer(run, mesh)

    def scored(params, reference):
        answers = [trainer.objective.answers(trainer.model, tree, batch) for tree in (params, reference)]
        return trainer.gradients(params, {}, batch, reference=reference), answers

    with jax.set_mesh(mesh):
        (sums, gradients), answers = jax.jit(scored)(params, reference)
    return trainer, batch, sums, gradients, answers


def test_loss_log_probs_and_gradients(models, ours):
    folder, processor, given = models
    model, reference = (loaded(folder / name) for name in ("published", "reference"))
    loss, metrics = theirs(folder, model, reference, processor, given)
    trainer, batch, sums, gradients, _ = ours
    assert set(np.asarray(batch.preference)[0]) == {0, 1, -1, 2, -2, 3, -3}, "all pairs are in one row"
    found = {name: float(value) for name, value in trainer.objective.means(sums).items()}
    expected = {
        "loss": loss,
        "reward_accuracy": metrics["rewards/accuracies"],
        "margin": metrics["rewards/margins"],
        "chosen_reward": metrics["rewards/chosen"],
        "rejected_reward": metrics["rewards/rejected"],
        "chosen_log_prob": metrics["logps/chosen"],
        "rejected_log_prob": metrics["logps/rejected"],
        "pairs": 3,
    }
    assert found == pytest.approx(expected, rel=1e-5, abs=1e-5)
    for parameter in model.parameters():
        # Layers behind the one whose features are read have none.
        parameter.data = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
    table = open_published(folder / "published").tables[0]
    wanted, gradients = (by_path(tree) for tree in (to_ours(saved_state(model), table, gradients), gradients))
    for tree in (wanted, gradients):
        # PyTorch's embeddings have no gradient for the padding token.
        tree["language/embedding"] = np.delete(tree["language/embedding"], PAD, axis=0)
    largest = max(np.abs(leaf).max() for leaf in wanted.values())
    for part in ("vision", "connector", "language"):
        assert max(np.abs(leaf).max() for path, leaf in wanted.items() if path.startswith(part)) > 1e-3 * largest
    worst = max((np.abs(leaf - wanted[path]).max(), path) for path, leaf in gradients.items())
    print(f"loss {loss:.4f}, largest difference of gradients {worst[0] / largest:.1e} of {largest:.1e}, in {worst[1]}")
    assert worst[0] < 1e-4 * largest, worst[1]


@pytest.mark.parametrize(
    ("settings", "changes"),
    [
        (dict(loss_type=["sigmoid", "sft"], loss_weights=[1.0, 0.7]), dict(chosen_loss=0.7)),
        # Of a single pair, TRL's "aot" is the conservative DPO, the one loss of its that smooths labels.
        (dict(loss_type=["aot"], label_smoothing=0.2), dict(label_smoothing=0.2)),
    ],
)
def test_other_losses_of_one_pair(models, ours, settings, changes):
    folder, processor, given = models
    model, reference = (loaded(folder / name) for name in ("published", "reference"))
    loss, _ = theirs(folder, model, reference, processor, given[1:2], **settings)
    _, batch, *_, answers = ours
    second = dataclasses.replace(batch, weights=np.where(np.abs(batch.preference) == 2, batch.weights, 0))
    objective = Preference(PreferenceConfig(beta=BETA, **changes))
    assert float(objective.means(objective.sums_of(*answers, second))["loss"]) == pytest.approx(loss, rel=1e-5)
