"""Several data sets in one run: a mixture in one stream, and sets that are accumulated into one update."""

import dataclasses
import functools
import json

import jax
import numpy as np
import pytest

from tests.tiny import initial_state, mesh_of, random_batch, tiny_run, write_data
from vlm_jax.config import JsonLinesConfig, MemberConfig, MixtureConfig, SetConfig
from vlm_jax.training import loop
from vlm_jax.training.sets import SetBatches, check_sets, open_sets
from vlm_jax.training.step import Trainer, update_batches

replace = dataclasses.replace


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    file = write_data(tmp_path_factory.mktemp("data"), 12)
    words = file.with_name("words.jsonl")  # text alone
    turns = lambda number: [{"from": "human", "value": f"{number}?"}, {"from": "gpt", "value": "none"}]
    words.write_text("\n".join(json.dumps({"id": number, "conversations": turns(number)}) for number in range(5)))
    return {"squares": JsonLinesConfig(train=str(file), eval=str(file)), "words": JsonLinesConfig(train=str(words), eval="")}


def accumulated_run(source, **changes):
    """The run's own data are squares; words are a fifth of it, in rows of another number, length and number of pictures."""
    run = tiny_run(steps=6, log_every=2, eval_every=3, save_every=2, keep_best=0)
    data = replace(run.data, source=source["squares"], tokens=24)
    words = replace(data, source=source["words"], rows=16, tokens=16, images=1, frames=2)
    run = replace(run, data=data, accumulated=(SetConfig(name="words", data=words, weight=0.2, evaluate=False),))
    return replace(run, **changes)


def test_an_update_adds_the_weighted_gradients_of_the_mean_losses(source):
    """Each mean is over its own set's learned tokens, however many the others have."""
    run, mesh = accumulated_run(source), mesh_of(1, 1, 1)
    with jax.set_mesh(mesh):
        trainer = Trainer(run, mesh)
        state = initial_state(trainer)
        own, words = random_batch(8, 0), random_batch(8, 1)
        words.weights[3:] = 0
        alone, of_sets = jax.jit(trainer.gradients), jax.jit(trainer.gradients_of_sets)
        one, other = (alone(state.trained, state.frozen, trainer.put(batch)) for batch in (own, words))
        sums, total = of_sets(state.trained, state.frozen, trainer.put((own, words)))
        in_turn = jax.eval_shape(of_sets, state.trained, state.frozen, (None, words))
        for batches in jax.eval_shape(lambda: update_batches(replace(run, sets="round_robin"))):
            trainer.train_step.trace(trainer.abstract_state, batches)
    expected = jax.tree.map(lambda a, b: a + 0.2 * b, one[1], other[1])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=1e-6), total, expected)
    assert float(sums["words"]["weight"]) == words.weights.sum() and float(sums[""]["weight"]) == own.weights.sum()
    assert list(in_turn[0]) == ["words"]


@pytest.mark.parametrize(
    ("sets", "every", "with_words"),
    [
        ("accumulate", 1, [0, 1, 2, 3, 4, 5]),
        ("accumulate", 3, [0, 3]),
        ("round_robin", 1, [1, 3, 5]),
    ],
)
def test_batches_of_sets_go_on_at_any_step(source, tmp_path, sets, every, with_words):
    run = accumulated_run(source, sets=sets)
    run = replace(run, accumulated=(replace(run.accumulated[0], every=every),))
    opened = open_sets(run, tmp_path)
    read = lambda start: list(SetBatches(run, opened, start=start))
    whole = read(0)
    kinds = [jax.tree.structure(batch) for batch in update_batches(run)]
    assert [jax.tree.structure(batches) for batches in whole] == [kinds[step % len(kinds)] for step in range(6)]
    assert [step for step, batches in enumerate(whole) if batches[1] is not None] == with_words
    assert [step for step, batches in enumerate(whole) if batches[0] is None] == ([1, 3, 5] if sets == "round_robin" else [])
    for start in (1, 4):
        for one, other in zip(read(start), whole[start:], strict=True):
            jax.tree.map(np.testing.assert_array_equal, one, other)
    tokens = [batches[1].tokens for batches in whole if batches[1] is not None]
    assert tokens[0].shape == (16, 16) and (tokens[0] != tokens[1]).any()  # no batch is left out in turn or taken twice


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture
def compiled_once(monkeypatch):
    """Runs of one configuration share their programs, on one device."""
    updates, compiles = [], loop._Run._compile

    def shared(self, state):
        if not updates:
            updates.append(compiles(self, state))
        return updates[0]

    monkeypatch.setattr(loop, "make_mesh", lambda config: mesh_of(1, 1, 1))
    monkeypatch.setattr(loop, "Trainer", functools.cache(Trainer))
    monkeypatch.setattr(loop._Run, "_compile", shared)


def test_a_run_that_is_ended_and_resumed_equals_an_undisturbed_one(source, tmp_path, monkeypatch, compiled_once):
    """Of a mixture, and a set beside it."""
    run = accumulated_run(source)
    member = lambda name, of, weight: MemberConfig(name=name, source=source[of], weight=weight, evaluate=of == "squares")
    members = (member("a", "squares", 2.0), member("b", "words", 1.0), member("c", "squares", 0.5))
    run = replace(run, data=replace(run.data, source=MixtureConfig(members=members)))
    loop.train(run, tmp_path / "whole")
    saved, save = [], loop._Run._save

    def ends(self, state, step, metrics):
        save(self, state, step, metrics)
        self.checkpoints.wait()
        saved.append(step)
        if saved == [2, 4]:
            raise SystemExit  # nothing after the checkpoint is done

    monkeypatch.setattr(loop._Run, "_save", ends)
    with pytest.raises(SystemExit):
        loop.train(run, tmp_path / "ended")
    loop.train(run, tmp_path / "ended")
    assert saved == [2, 4, 6]
    assert metrics(tmp_path / "ended") == metrics(tmp_path / "whole")
    lines = metrics(tmp_path / "whole")
    for line in lines:
        if "eval_loss" not in line:
            assert line["weighted_loss"] == pytest.approx(line["loss"] + 0.2 * line["words/loss"])
    assert (lines[-1]["eval_sequences"], lines[-1]["eval_a/sequences"], lines[-1]["eval_c/sequences"]) == (24, 12, 12)
    assert "eval_b/loss" not in lines[-1] and "eval_words/loss" not in lines[-1]
    other = replace(run, accumulated=(replace(run.accumulated[0], weight=0.3),))
    with pytest.raises(ValueError, match=r"accumulated\.words\.weight: 0\.2 -> 0\.3"):
        loop.train(other, tmp_path / "whole")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(weight=0.0), r"config\.accumulated\.words\.weight=0\.0"),
        (dict(name="a/b"), r"config\.accumulated\.a/b: expected names"),
        (dict(every=0), r"config\.accumulated\.words\.every=0: expected 1 or more"),
        (dict(data=dict(end="</s>")), r"accumulated\.words\.data\.end='</s>': the sets of a run share it"),
        (dict(data=dict(visual_tokens=4)), r"accumulated\.words: config\.data\.visual_tokens=4"),
        (dict(data=dict(rows=5)), r"config\.accumulated\.words\.data\.rows=5 does not divide"),
    ],
)
def test_a_wrong_set_is_named(source, changes, message):
    run = accumulated_run(source)
    words = run.accumulated[0]
    data = replace(words.data, **changes.pop("data", {}))
    run = replace(run, accumulated=(replace(words, data=data, **changes),))
    with pytest.raises(ValueError, match=message):
        check_sets(run)
        Trainer(run, mesh_of(2, 1, 1))


def test_a_run_of_another_tokenizer_is_refused_as_the_start(source, tmp_path):
    """A tokenizer that is trained anew on other texts gives the numbers of its tokens other meanings."""
    run = replace(accumulated_run(source), accumulated=())
    run = replace(run, data=replace(run.data, cache_dir=str(tmp_path / "cache")))
    open_sets(run, tmp_path / "before")
    after = replace(run, init_from=str(tmp_path / "before"))
    open_sets(after, tmp_path / "same")
    other = replace(after, data=replace(after.data, source=source["words"]))
    other = replace(other, data=replace(other.data, source=replace(source["words"], eval=source["words"].train)))
    with pytest.raises(ValueError, match=r"trained with another tokenizer: set config.data.tokenizer=.*before/tokenizer"):
        open_sets(other, tmp_path / "other")
    named = replace(other, data=replace(other.data, tokenizer=str(tmp_path / "before" / "tokenizer")))
    open_sets(named, tmp_path / "named")
