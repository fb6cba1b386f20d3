"""CLIP's and SigLIP's losses: equal to transformers' from texts and files, on every mesh, in both forms, in micro-batches."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from test_encoder_folders import two_towers

from tests.tiny import initial_state, mesh_of, tiny_run
from tests.training.pairs import CAPTIONS, get_config, pair_run
from vlm_jax.config import ContrastiveConfig, OptimizerConfig, ParamRule, RunConfig
from vlm_jax.config_dict import from_config_dict, from_dict, to_dict
from vlm_jax.data.pipeline import build_source, eval_batches
from vlm_jax.interop.engine import to_published
from vlm_jax.interop.published import open_published
from vlm_jax.ops.contrastive import ContrastiveLoss, Pairs, groups_of
from vlm_jax.paths import by_path
from vlm_jax.training.processors import build_processor
from vlm_jax.training.step import Trainer, zeros_batch

MESHES = [(1, 1, 1), (2, 2, 2)]


@pytest.mark.parametrize("family", ["clip", "siglip"])
def test_loss_and_every_gradient_equal_transformers(family, tmp_path):
    """From captions and picture files; the batch has two empty rows, which do not count."""
    model, processor = two_towers(tmp_path / "published", family)
    config = pair_run(tmp_path, tmp_path / "published", rows=8)
    pictures = [Image.open(tmp_path / "data" / f"{number}.png") for number in range(len(CAPTIONS))]
    inputs = processor(images=pictures, text=CAPTIONS, padding="max_length", max_length=12, return_tensors="pt")
    model.zero_grad()
    theirs = model(input_ids=inputs["input_ids"], pixel_values=inputs["pixel_values"], return_loss=True).loss
    theirs.backward()
    expected = {name: parameter.grad.numpy() for name, parameter in model.named_parameters() if parameter.grad is not None}

    published = open_published(tmp_path / "published")
    held_out = build_source(config.data, "eval")
    prepared = build_processor(config.data, held_out, tmp_path / "run")
    (batch,) = eval_batches(config.data, prepared, held_out)
    form, micro = {"clip": ("ring", 2), "siglip": ("all_gather", 1)}[family]
    objective, optimizer = ContrastiveConfig(exchange=form), dataclasses.replace(config.optimizer, accumulate=micro)
    mesh = mesh_of(2, 2, 2)
    with jax.set_mesh(mesh):
        trainer = Trainer(dataclasses.replace(config, objective=objective, optimizer=optimizer), mesh)
        state = trainer.state_of(published.load_params(mesh))
        sums, gradients = jax.jit(trainer.gradients)(state.trained, state.frozen, trainer.put(batch))
    means = trainer.objective.means(jax.device_get(sums))
    assert means["pairs"] == len(CAPTIONS)
    np.testing.assert_allclose(means["loss"], theirs.item(), rtol=1e-5)
    found = dict(to_published(jax.device_get(gradients), published.tables[0]))
    assert expected.keys() <= found.keys()
    for name, value in expected.items():
        tolerance = 1e-4 * max(np.abs(value).max(), 1e-2)  # a key's bias has no gradient but rounding
        np.testing.assert_allclose(found[name].reshape(value.shape), value, atol=tolerance, err_msg=name)


def unit(rng, rows):
    x = rng.standard_normal((rows, 8)).astype(np.float32)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def direct(pairs, scale, bias, *, loss, smoothing):
    """The loss a pair, written down as the papers have it, of the pairs that are there."""
    there = np.flatnonzero(np.asarray(pairs.weights) > 0)
    logits = scale * pairs.images[there] @ pairs.texts[there].T + bias
    same = jnp.eye(len(there), dtype=bool)
    counts = same | (pairs.groups[there][:, None] != pairs.groups[there][None])
    weights = pairs.weights[there]
    if loss == "sigmoid":
        each = -jnp.where(counts, jax.nn.log_sigmoid(jnp.where(same, logits, -logits)), 0)
        return jnp.sum((weights[:, None] + weights[None]) / 2 * each) / weights.sum()
    total = 0.0
    for z in (logits, logits.T):
        logs = jax.nn.log_softmax(jnp.where(counts, z, -jnp.inf), axis=1)
        nll = -(1 - smoothing) * jnp.diag(logs) - smoothing * jnp.sum(jnp.where(counts, logs, 0), 1) / counts.sum(1)
        total += jnp.sum(weights * nll) / weights.sum() / 2
    return total


@pytest.mark.parametrize("loss", ["softmax", "sigmoid"])
def test_every_mesh_and_both_forms_give_the_papers_loss(loss):
    """With weights, rows that are empty, and texts that occur twice."""
    rng = np.random.default_rng(0)
    weights = np.ones(16, np.float32)
    weights[[3, 4, 15]], weights[2] = 0, 0.5
    images, texts, groups = unit(rng, 16), unit(rng, 16), rng.integers(0, 9, 16).astype(np.int32)
    smoothing = 0.1 if loss == "softmax" else 0.0
    of = lambda images, texts: Pairs(images=images, texts=texts, weights=weights, rows=jnp.arange(16), groups=groups)
    arguments = (images, texts, jnp.float32(5), jnp.float32(-2))
    wanted = jax.value_and_grad(
        lambda x, y, scale, bias: direct(of(x, y), scale, bias, loss=loss, smoothing=smoothing), argnums=(0, 1, 2, 3)
    )(*arguments)
    for sizes in MESHES:
        for form in ("all_gather", "ring"):
            one = ContrastiveLoss(loss=loss, exchange=form, label_smoothing=smoothing)

            def mean(x, y, scale, bias, one=one):
                sums = one.sums(of(x, y), scale, bias)
                return sums["loss"] / sums["weight"], sums

            with jax.set_mesh(mesh_of(*sizes)):
                (value, sums), gradients = jax.jit(jax.value_and_grad(mean, argnums=(0, 1, 2, 3), has_aux=True))(*arguments)
            for ours, theirs in zip(jax.tree.leaves((value, gradients)), jax.tree.leaves(wanted), strict=True):
                np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=2e-5, err_msg=f"{sizes} {form}")
            assert (sums["pairs"], sums["weight"]) == (13, 12.5)


def test_the_most_similar_is_right():
    x = jnp.eye(4)
    pairs = Pairs(images=x, texts=x[jnp.array([0, 1, 3, 2])], weights=jnp.array([1.0, 1, 1, 0]), rows=jnp.arange(4))
    sums = ContrastiveLoss(loss="softmax").sums(pairs, jnp.float32(1), jnp.float32(0))
    assert (sums["images_right"], sums["texts_right"], sums["pairs"]) == (2, 2, 3)


def test_groups_are_the_same_texts():
    tokens = jnp.array([[1, 2, 3], [1, 3, 2], [1, 2, 3], [0, 2, 3]])
    groups = groups_of(tokens).tolist()
    assert groups[0] == groups[2] and len(set(groups)) == 3


def test_a_locked_tower_has_no_gradient(tmp_path):
    """LiT (Zhai et al. 2022): the image encoder is frozen."""
    two_towers(tmp_path / "published", "clip")
    rules = (ParamRule(pattern="^image/encoder/", frozen=True),)
    config = pair_run(tmp_path, tmp_path / "published", rows=8, optimizer=OptimizerConfig(lr=1.0, warmup_steps=0, rules=rules))
    mesh = mesh_of(1, 1, 1)
    with jax.set_mesh(mesh):
        trainer = Trainer(config, mesh)
        state, batch = trainer.abstract_state, zeros_batch(config, 8)
        _, gradients = jax.eval_shape(trainer.gradients, state.trained, state.frozen, batch)
    towers = {path.split("/")[0]: path for path in by_path(gradients)}
    assert towers["image"] == "image/projection/kernel" and "text" in towers


def test_micro_batches_give_the_same_gradients_in_less_memory():
    """GradCache (Gao et al. 2021): one loss over all pairs, the activations of one micro-batch at a time."""
    config, mesh, rng, rows = from_config_dict(RunConfig, get_config()), mesh_of(1, 1, 1), np.random.default_rng(0), 64
    data = dataclasses.replace(config.data, rows=rows)
    batch = dataclasses.replace(
        zeros_batch(dataclasses.replace(config, data=data), rows),
        images=jnp.asarray(rng.integers(0, 256, (rows, 1, 1, 16, 16, 3), dtype=np.uint8)),
        tokens=jnp.asarray(rng.integers(0, 300, (rows, 16), dtype=np.int32)),
        weights=jnp.ones((rows, 16)),
    )
    found, memory = {}, {}
    with jax.set_mesh(mesh):
        for micro in (1, 8):
            optimizer = dataclasses.replace(config.optimizer, accumulate=micro)
            trainer = Trainer(dataclasses.replace(config, data=data, optimizer=optimizer), mesh)
            state = initial_state(trainer)
            program = jax.jit(trainer.gradients).lower(state.trained, state.frozen, batch).compile()
            found[micro] = program(state.trained, state.frozen, batch)
            memory[micro] = program.memory_analysis().temp_size_in_bytes
    for one, other in zip(*map(jax.tree.leaves, found.values()), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)
    assert memory[8] < memory[1] / 3


def test_what_does_not_go_together_is_refused(tmp_path):
    config = to_dict(from_config_dict(RunConfig, get_config()))
    changed = lambda **changes: from_dict(RunConfig, config | changes)
    with pytest.raises(ValueError, match="this model writes no text"):
        changed(objective={"kind": "next_token"})
    with pytest.raises(ValueError, match="set it to 'pair'"):
        changed(data=config["data"] | {"layout": "conversation"})
    with pytest.raises(ValueError, match="a pair has one picture"):
        changed(data=config["data"] | {"images": 2})
    with pytest.raises(ValueError, match="the text tower has learned 16 positions"):
        changed(data=config["data"] | {"tokens": 17})
    with pytest.raises(ValueError, match="trains two towers"):
        from_dict(RunConfig, to_dict(tiny_run(objective=ContrastiveConfig())))
