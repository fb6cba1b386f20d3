import dataclasses
import json
import logging
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.tiny import COLOURS, initial_state, mesh_of, random_params, tiny_run, write_data
from vlm_jax.batch import Batch
from vlm_jax.config import JsonLinesConfig, OptimizerConfig, ParamRule, PreferenceConfig, RunConfig
from vlm_jax.data.pipeline import TrainBatches, eval_batches
from vlm_jax.ops.preference import dpo_loss, pair_log_probs
from vlm_jax.paths import by_path, nested
from vlm_jax.training.checkpoint import Checkpoints
from vlm_jax.training.flops import count_flops
from vlm_jax.training.objectives.preference import Preference, without_adapters
from vlm_jax.training.sets import check_data
from vlm_jax.training.step import Trainer
from vlm_jax.training.table import start_table

sys.path.append(str(Path(__file__).parents[2] / "data"))
from data_helpers import parts

FROZEN_VISION = (ParamRule(pattern="^vision", frozen=True),)


def pairs_run(folder, **objective):
    """A run on coloured squares: chosen is the colour, rejected another one, in other words."""
    write_data(folder)
    names = list(COLOURS)
    record = lambda n: {
        "image": f"{n}.png",
        "question": "which colour?",
        "chosen": names[n % 4],
        "rejected": f"perhaps {names[(n + 1) % 4]}",
    }
    path = folder / "pairs.jsonl"
    path.write_text("".join(json.dumps(record(number)) + "\n" for number in range(24)))
    run = tiny_run(objective=PreferenceConfig(beta=0.5, **objective), steps=30)
    source = JsonLinesConfig(train=str(path), eval=str(path))
    data = dataclasses.replace(run.data, source=source, pairs=True, cache_dir=str(folder / "cache"))
    optimizer = OptimizerConfig(lr=3e-3, warmup_steps=1, rules=FROZEN_VISION)
    return dataclasses.replace(run, data=data, optimizer=optimizer)


@dataclasses.dataclass
class Setting:
    folder: Path
    run: RunConfig
    trainer: Trainer
    batch: Batch  # of the first step


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    """On two devices that share the parameters."""
    folder = tmp_path_factory.mktemp("pairs")
    run = pairs_run(folder)
    check_data(run)
    processor, source = parts(run.data)
    mesh = mesh_of(1, 2, 1)
    with jax.set_mesh(mesh), TrainBatches(run, processor, source) as batches:
        return Setting(folder, run, Trainer(run, mesh), next(batches))


@pytest.fixture(scope="module")
def trained(setting):
    """Metrics of 21 steps; the first state and that after 20 steps, which is saved in the setting's folder."""
    trainer = setting.trainer
    with jax.set_mesh(trainer.mesh):
        state = initial_state(trainer)
        first = jax.device_get(state)
        metrics, batch = [], trainer.put(setting.batch)
        for step in range(21):
            if step == 20:
                last, shardings = jax.device_get(state), jax.tree.map(lambda leaf: leaf.sharding, state)
                checkpoints = Checkpoints(setting.folder, 1, 0)
                checkpoints.save(state, 20)
                checkpoints.wait()
                checkpoints.close()
            state, found = trainer.train_step(state, batch)
            metrics.append({name: float(value) for name, value in found.items()})
    return metrics, first, last, shardings


def test_policy_and_reference_are_one_at_first_and_part(trained):
    metrics, first, last, shardings = trained
    assert metrics[0]["loss"] == pytest.approx(np.log(2), abs=1e-6)
    assert abs(metrics[0]["margin"]) < 1e-5 and metrics[0]["pairs"] == 16
    assert metrics[-1]["loss"] < 0.5 * metrics[0]["loss"] and metrics[-1]["margin"] > 0.5
    assert metrics[-1]["reward_accuracy"] == 1
    assert {path.split("/")[0] for path in by_path(first.reference)} == {"connector", "fusion", "language"}
    for path, leaf in by_path(last.reference).items():
        np.testing.assert_array_equal(leaf, by_path(first.trained)[path], err_msg=path)
        assert by_path(shardings.reference)[path] == by_path(shardings.trained)[path]
    assert np.any(last.trained["connector"]["latents"] != last.reference["connector"]["latents"])


def test_a_resumed_run_goes_on_with_the_reference_of_its_beginning(setting, trained):
    """Bit for bit; a reference taken from the parameters at the resumption would begin at ln 2 again."""
    trainer, (metrics, first, *_) = setting.trainer, trained
    with jax.set_mesh(trainer.mesh):
        checkpoints = Checkpoints(setting.folder, 1, 0)
        state, step = checkpoints.restore(trainer)
        checkpoints.close()
        jax.tree.map(np.testing.assert_array_equal, jax.device_get(state.reference), first.reference)
        _, again = trainer.train_step(state, trainer.put(setting.batch))
    assert step == 20 and {name: float(value) for name, value in again.items()} == metrics[20]
    assert metrics[20]["loss"] < 0.5 * metrics[0]["loss"]


def alone(batch, row, segments):
    """Some conversations of a row, each in a row of its own at its beginning, with its picture in the first slot."""
    out = jax.tree.map(np.zeros_like, batch)
    for place, segment in enumerate(segments):
        here = np.flatnonzero(batch.segments[row] == segment)
        slot = int(batch.media_last[row, here].max())
        for name in ("tokens", "positions", "targets", "weights", "prefix_end"):
            getattr(out, name)[place, : len(here)] = getattr(batch, name)[row, here]
        for name in ("media_last", "media_first", "segments"):
            getattr(out, name)[place, : len(here)] = np.minimum(getattr(batch, name)[row, here], 1)
        out.preference[place, : len(here)] = np.sign(batch.preference[row, here])
        out.images[place, 0], out.frames[place, 0] = batch.images[row, slot - 1], batch.frames[row, slot - 1]
    return out


def test_answers_of_a_packed_row_are_those_of_each_conversation_alone(setting):
    batch, objective, model = setting.batch, setting.trainer.objective, setting.trainer.model
    slots = [set(batch.media_last[0, np.abs(batch.preference[0]) == pair].tolist()) - {0} for pair in (1, 2)]
    assert slots == [{1}, {2}] and batch.segments[0].max() == 4, "both answers of a pair see the same slot"
    params = random_params(model, *model.example())
    answers = jax.jit(lambda batch: objective.answers(model, params, batch))
    packed, single = jax.device_get((answers(batch), answers(alone(batch, 0, (1, 2, 3, 4)))))
    for place in range(4):
        side, pair = place % 2, place // 2
        np.testing.assert_allclose(packed[side][0, pair], single[side][place, 0], rtol=1e-4)
        count = batch.weights[0, batch.segments[0] == place + 1].sum()
        assert packed[2 + side][0, pair] == single[2 + side][place, 0] == count > 0
    assert len({float(x) for x in (*packed[0][0, :2], *packed[1][0, :2])}) == 4


def test_a_frozen_vision_encoder_works_once_for_policy_and_reference(setting):
    model, batch = setting.trainer.model, setting.batch
    objective = Preference(PreferenceConfig())
    params = setting.trainer.abstract_state.params
    vision = count_flops(
        lambda params, images: model.apply({"params": params}, images.reshape(-1, 16, 16, 3), method="features"),
        params,
        batch.images,
    )

    def of(params, copied):
        reference = {name: jax.tree.map(lambda leaf: leaf + 0, params[name]) for name in copied}
        return objective.sums(model, params, batch, recompute=False, reference=reference)

    frozen, trained = (
        count_flops(lambda params, names=names: of(params, names), params)
        for names in (("connector", "fusion", "language"), tuple(params))
    )
    assert trained - frozen == vision > 0


# ---------------------------------------------------------------------------------------------------------------------
# The mathematics, from log-probabilities
# ---------------------------------------------------------------------------------------------------------------------

PREFERENCE = np.array([[1, 1, 1, -1, -1, 2, 2, -2, -2, 0], [1, 1, -1, -1, -1, -1, 0, 0, 0, 0]], np.int32)
WEIGHTS = np.array([[0, 1, 1, 0, 1, 0, 1, 1, 1, 0], [0, 1, 0, 0, 1, 1, 0, 0, 0, 0]], np.float32)
NLL = np.random.default_rng(0).uniform(0.1, 3, PREFERENCE.shape).astype(np.float32)
OTHER = np.random.default_rng(1).uniform(0.1, 3, PREFERENCE.shape).astype(np.float32)
ROWS = Batch(
    **dict.fromkeys(("positions", "segments", "media_last", "media_first", "prefix_end", "targets"), PREFERENCE),
    tokens=PREFERENCE, weights=WEIGHTS, preference=PREFERENCE,
)  # fmt: skip


def answers_of(nll, weights=WEIGHTS, preference=PREFERENCE):
    return scored(nll, weights > 0, preference, pairs=preference.shape[1] // 2 + 1)


scored = jax.jit(pair_log_probs, static_argnames="pairs")


def by_hand(beta, smoothing=0.0, normalised=False, chosen_loss=0.0, reference=True):
    """[(loss, margin)] of the three pairs."""
    out = []
    for row, pair in ((0, 1), (0, 2), (1, 1)):
        here = lambda sign, row=row, pair=pair: (PREFERENCE[row] == sign * pair) & (WEIGHTS[row] > 0)
        log_prob = lambda nll, sign, row=row, here=here: -nll[row, here(sign)].astype(np.float64).sum()
        ratios = [log_prob(NLL, sign) - (log_prob(OTHER, sign) if reference else 0) for sign in (1, -1)]
        counts = [here(sign).sum() for sign in (1, -1)]
        rewards = [beta * ratio / (count if normalised else 1) for ratio, count in zip(ratios, counts, strict=True)]
        margin = rewards[0] - rewards[1]
        loss = -(1 - smoothing) * np.log(1 / (1 + np.exp(-margin))) - smoothing * np.log(1 / (1 + np.exp(margin)))
        out.append((loss - chosen_loss * log_prob(NLL, 1) / counts[0], margin))
    return np.array(out)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (dict(beta=0.7), dict(beta=0.7)),
        (dict(beta=0.7, label_smoothing=0.2), dict(beta=0.7, smoothing=0.2)),
        (dict(beta=0.7, length_normalised=True), dict(beta=0.7, normalised=True)),
        (dict(beta=0.7, chosen_loss=0.3), dict(beta=0.7, chosen_loss=0.3)),
        (dict(beta=0.7, reference="none"), dict(beta=0.7, reference=False)),
    ],
)
def test_the_loss_by_hand(settings, expected):
    objective = Preference(PreferenceConfig(**settings))
    base = None if objective.config.reference == "none" else answers_of(OTHER)
    means = objective.means(jax.jit(objective.sums_of)(answers_of(NLL), base, ROWS))
    wanted = by_hand(**expected)
    np.testing.assert_allclose([means["loss"], means["margin"]], wanted.mean(0), rtol=1e-5)
    np.testing.assert_allclose(means["reward_accuracy"], (wanted[:, 1] > 0).mean(), rtol=1e-6)
    assert objective.weight(ROWS) == means["pairs"] == 3


def test_sums_of_several_batches_add_up():
    objective = Preference(PreferenceConfig(beta=0.7))
    sums_of = jax.jit(objective.sums_of)
    whole = sums_of(answers_of(NLL), answers_of(OTHER), ROWS)
    total = dict.fromkeys(whole, 0.0)
    for row in (slice(0, 1), slice(1, 2)):
        part = jax.tree.map(lambda x, row=row: x[row], ROWS)
        answers = [answers_of(nll[row], WEIGHTS[row], PREFERENCE[row]) for nll in (NLL, OTHER)]
        total = {name: total[name] + value for name, value in sums_of(*answers, part).items()}
    for name, value in whole.items():
        np.testing.assert_allclose(total[name], value, rtol=1e-6, err_msg=name)


def test_a_batch_without_pairs_gives_zero_and_no_gradient():
    objective = Preference(PreferenceConfig(chosen_loss=1.0, length_normalised=True))
    nothing = dataclasses.replace(ROWS, weights=np.zeros_like(WEIGHTS), preference=np.zeros_like(PREFERENCE))
    empty = lambda nll: answers_of(nll, nothing.weights, nothing.preference)
    sums = jax.jit(lambda nll: objective.sums_of(empty(nll), empty(OTHER), nothing))
    assert all(float(value) == 0 for value in objective.means(sums(NLL)).values())
    assert objective.weight(nothing) == 1 and not np.any(jax.grad(lambda nll: sums(nll)["loss"])(NLL))


def test_the_loss_of_a_large_margin_is_finite():
    assert float(dpo_loss(jnp.float32(-500.0), jnp.float32(500.0))) == 1000
    with pytest.raises(ValueError, match=r"label_smoothing=0\.5: expected at least 0 and below 0\.5"):
        Preference(PreferenceConfig(label_smoothing=0.5))


# ---------------------------------------------------------------------------------------------------------------------
# The reference of adapters
# ---------------------------------------------------------------------------------------------------------------------

ADAPTED = nested(
    {
        "connector/up/kernel": jnp.full(2, 1.0),
        "language/layers/query/kernel": jnp.full(2, 2.0),
        "language/layers/query/lora/default/a": jnp.full(2, 3.0),
        "language/layers/query/lora/default/b": jnp.zeros(2),
        "vision/loralike/kernel": jnp.full(2, 4.0),
    }
)


def of_paths(*parts):
    return nested({path: leaf for path, leaf in by_path(ADAPTED).items() if any(part in path for part in parts)})


def test_with_adapters_the_base_is_the_reference_and_nothing_is_copied():
    objective = Preference(PreferenceConfig())
    assert objective.reference_of(of_paths("/lora/")) == {}
    assert objective.describe_reference(of_paths("/lora/")) == (
        "the reference is the base model without its adapters: nothing is copied"
    )
    base = without_adapters(ADAPTED)
    assert set(by_path(base)) == {"connector/up/kernel", "language/layers/query/kernel", "vision/loralike/kernel"}
    assert by_path(objective.reference_params(ADAPTED, {})).keys() == by_path(base).keys()


def test_beside_adapters_what_else_is_trained_is_copied():
    objective = Preference(PreferenceConfig(reference_dtype="bfloat16"))
    copies = objective.reference_of(of_paths("/lora/", "connector"))
    assert {path: leaf.dtype for path, leaf in by_path(copies).items()} == {"connector/up/kernel": jnp.bfloat16}
    assert "with frozen copies of 1 other trained arrays" in objective.describe_reference(of_paths("/lora/", "connector"))
    moved = jax.tree.map(lambda leaf: leaf + 1, ADAPTED)
    found = by_path(objective.reference_params(moved, copies))
    assert float(found["connector/up/kernel"][0]) == 1 and float(found["language/layers/query/kernel"][0]) == 3


def test_a_run_that_begins_with_trained_adapters_is_warned(caplog):
    begun = jax.tree.map(lambda leaf: leaf + 1, of_paths("/lora/"))
    with caplog.at_level(logging.WARNING):
        Preference(PreferenceConfig()).check_start(of_paths("/lora/"))
        assert not caplog.records
        Preference(PreferenceConfig(reference="with_adapters")).check_start(begun)
        assert not caplog.records
        Preference(PreferenceConfig()).check_start(begun)
    assert "set config.objective.reference=with_adapters" in caplog.text
    copies = Preference(PreferenceConfig(reference="with_adapters")).reference_of(begun)
    assert by_path(copies).keys() == by_path(begun).keys()


def test_the_table_shows_the_reference(setting):
    with jax.set_mesh(setting.trainer.mesh):
        table, notes = start_table(setting.trainer)
    columns = [list(column.cells) for column in table.columns]
    row = columns[0].index("reference")
    copied = sum(leaf.size for leaf in jax.tree.leaves(setting.trainer.abstract_state.trained))
    assert (columns[1][row], columns[2][row], columns[3][row]) == (f"{copied:,}", "frozen copy", "float32")
    assert any("the reference is a frozen copy of the" in note for note in notes)


def test_pairs_and_the_objective_go_together(setting):
    without = dataclasses.replace(setting.run.data, pairs=False)
    with pytest.raises(ValueError, match=r"data\.pairs=False: the objective 'preference' needs True"):
        check_data(dataclasses.replace(setting.run, data=without))


def test_an_evaluation_sees_every_pair_once(setting):
    processor, source = parts(setting.run.data)
    weights = [setting.trainer.objective.weight(batch) for batch in eval_batches(setting.run.data, processor, source)]
    assert sum(weights) == 24
