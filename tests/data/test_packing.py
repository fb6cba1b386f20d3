import dataclasses
import pickle
import threading
import types

import numpy as np
import pytest

from vlm_jax.data import packing
from vlm_jax.data.packing import Lengths, PackedRows, hash_uint64, plan_epoch

GOLDEN_MIX = [2249669389545321065, 2372969240919814197, 7954767119727130297]
GOLDEN_ROW = [[1, 0], [16, 13], [2], [19, 18]]


def lengths_of(examples: int, seed=0, most=30) -> Lengths:
    rng = np.random.default_rng(seed)
    counts = rng.integers(1, 9, examples)
    example = np.repeat(np.arange(examples), counts)
    return Lengths(rng.integers(1, most, len(example)).astype(np.int32), example, rng.integers(0, 4, examples))


def check(plan, lengths, tokens, images, per_image):
    seen = np.concatenate([unit for row in range(len(plan)) for unit in plan[row]])
    assert sorted(seen) == list(range(len(lengths.tokens)))
    for row in range(len(plan)):
        units = plan[row]
        assert units and all(len(unit) for unit in units)
        assert sum(lengths.tokens[unit].sum() for unit in units) <= tokens
        assert sum(lengths.images[lengths.example[unit[0]]] for unit in units) <= images
        for unit in units:
            assert len(set(lengths.example[unit])) == 1
            assert not per_image or len(unit) <= per_image


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("per_image", [0, 1, 3])
@pytest.mark.parametrize(("tokens", "images"), [(30, 3), (64, 4), (500, 8)])
def test_every_sequence_once_and_never_too_much(shuffle, per_image, tokens, images):
    lengths = lengths_of(200)
    check(plan_epoch(lengths, tokens, images, per_image, 5, 2, shuffle=shuffle), lengths, tokens, images, per_image)


def test_sequences_of_an_example_stay_together_if_they_may():
    lengths = lengths_of(100)
    plan = plan_epoch(lengths, 1000, 8)
    units = [unit for row in range(len(plan)) for unit in plan[row]]
    assert len(units) == 100


def test_rows_are_well_filled():
    lengths = lengths_of(2000)
    plan = plan_epoch(lengths, 256, 16, 4)
    assert lengths.tokens.sum() / (256 * len(plan)) > 0.95


def test_unshuffled_begins_at_the_beginning():
    lengths = lengths_of(50)
    plan = plan_epoch(lengths, 64, 4, shuffle=False)
    first = np.concatenate([unit for row in range(3) for unit in plan[row]])
    assert first.max() < 40 and plan[0][0][0] == 0


def as_lists(plan):
    return [[unit.tolist() for unit in plan[row]] for row in range(len(plan))]


def test_epochs_and_seeds_differ_and_repeat():
    lengths = lengths_of(200)
    plans = [as_lists(plan_epoch(lengths, 64, 4, 2, seed, epoch)) for seed, epoch in [(0, 0), (0, 1), (1, 0), (0, 0)]]
    assert plans[0] == plans[3]
    assert plans[0] != plans[1] != plans[2] != plans[0]
    # With fewer sequences a picture than there are, the partners change too.
    partners = [{tuple(sorted(unit)) for row in plan for unit in row} for plan in plans[:2]]
    assert len(partners[0] & partners[1]) < 0.7 * len(partners[0])


def test_the_shuffle_is_for_ever():
    # What resuming relies on, whatever the release of NumPy.
    assert hash_uint64(1, 2, np.arange(3)).tolist() == GOLDEN_MIX
    plan = plan_epoch(lengths_of(5), 64, 4, 2, seed=3, epoch=1)
    assert as_lists(plan)[0] == GOLDEN_ROW


def test_hashes_are_uniform():
    values = hash_uint64(0, 0, 2, np.arange(10_000)).astype(np.float64) / 2**64
    assert len(np.unique(values)) == 10_000
    assert abs(values.mean() - 0.5) < 0.02 and abs(np.corrcoef(values[1:], values[:-1])[0, 1]) < 0.04


def store_of(lengths: Lengths, folder):
    """What packing reads of a token store."""
    return types.SimpleNamespace(lengths_to_pack=lengths, folder=folder)


def test_rows_of_all_epochs(tmp_path):
    lengths = lengths_of(40)
    rows = PackedRows(store_of(lengths, tmp_path), 64, 4, 2, 7)
    sizes = [len(plan_epoch(lengths, 64, 4, 2, 7, epoch)) for epoch in range(4)]
    assert rows.locate(0) == (0, 0) and rows.locate(sizes[0]) == (1, 0) and rows.locate(sizes[0] - 1) == (0, sizes[0] - 1)
    for epoch in range(4):
        first = sum(sizes[:epoch])
        seen = np.concatenate([unit for row in range(first, first + sizes[epoch]) for unit in rows[row]])
        assert sorted(seen) == list(range(len(lengths.tokens)))
    again = pickle.loads(pickle.dumps(rows))  # jumps at once to where the other has walked
    for row in (sum(sizes) - 1, 3, sum(sizes[:2])):
        assert [unit.tolist() for unit in again[row]] == [unit.tolist() for unit in rows[row]]


def test_a_plan_is_kept_and_read_again(tmp_path, monkeypatch):
    lengths = lengths_of(40)
    args = [(64, 4, 2, 7), (65, 4, 2, 7), (64, 5, 2, 7), (64, 4, 3, 7), (64, 4, 2, 8)]
    expected = {(*one, epoch): as_lists(plan_epoch(lengths, *one, epoch)) for one in args for epoch in range(2)}
    store = store_of(lengths, tmp_path)
    for one in args:
        for epoch in range(2):
            PackedRows(store, *one).plan(epoch)
    monkeypatch.setattr(packing, "plan_epoch", lambda *_: pytest.fail("planned again"))
    for (*one, epoch), plan in expected.items():
        assert as_lists(PackedRows(store, *one).plan(epoch)) == plan
    assert not list((tmp_path / "plans").glob(".*"))


def test_an_interrupted_plan_leaves_nothing_that_could_be_taken_for_one(tmp_path, monkeypatch):
    lengths = lengths_of(40)
    rows = PackedRows(store_of(lengths, tmp_path), 64, 4, 2, 7)
    save, saved = np.save, []

    def stopped(path, array):
        saved.append(path)
        if len(saved) == 2:
            raise KeyboardInterrupt
        save(path, array)

    monkeypatch.setattr(packing.np, "save", stopped)
    with pytest.raises(KeyboardInterrupt):
        rows.plan(0)
    assert not [path for path in (tmp_path / "plans").iterdir() if path.is_dir()]
    assert as_lists(rows.plan(0)) == as_lists(plan_epoch(lengths, 64, 4, 2, 7, 0))


def test_one_plans_and_the_others_wait(tmp_path, monkeypatch):
    lengths, planned, go_on = lengths_of(40), [], threading.Event()

    def slow(*args):
        planned.append(args)
        go_on.wait(20)
        return plan_epoch(*args)

    monkeypatch.setattr(packing, "plan_epoch", slow)
    found = {}
    rows = [PackedRows(store_of(lengths, tmp_path), 64, 4, 2, 7) for _ in range(3)]
    threads = [threading.Thread(target=lambda n=n: found.setdefault(n, as_lists(rows[n].plan(0)))) for n in range(3)]
    for thread in threads:
        thread.start()
    threads[2].join(0.5)  # time for a second one to begin, if it may
    assert len(planned) == 1 and not found
    go_on.set()
    for thread in threads:
        thread.join(20)
    assert len(planned) == 1 and found[0] == found[1] == found[2] == as_lists(plan_epoch(lengths, 64, 4, 2, 7, 0))


def test_what_fits_in_no_row():
    with pytest.raises(ValueError, match="longer than a row"):
        plan_epoch(Lengths(np.array([9]), np.array([0]), np.array([1])), 8, 4)
    with pytest.raises(ValueError, match="more images"):
        plan_epoch(Lengths(np.array([3]), np.array([0]), np.array([5])), 8, 4)
    exact = plan_epoch(Lengths(np.array([8, 8]), np.array([0, 0]), np.array([4])), 8, 4)
    assert as_lists(exact) in ([[[0]], [[1]]], [[[1]], [[0]]])


def test_a_sequence_of_a_share_is_in_that_share_of_the_epochs():
    plain = lengths_of(300)
    share = np.where(np.arange(len(plain.tokens)) % 2, 0.25, 1.0).astype(np.float32)
    lengths = dataclasses.replace(plain, share=share)
    seen = np.zeros(len(share))
    for epoch in range(20):
        chosen = np.sort(plan_epoch(lengths, 64, 4, 3, 0, epoch).sequences)
        assert (np.diff(chosen) > 0).all()
        seen[chosen] += 1
    assert (seen[::2] == 20).all()
    assert abs(seen[1::2].mean() / 20 - 0.25) < 0.02 and seen[1::2].max() < 15
    check(plan_epoch(lengths, 64, 4, shuffle=False), lengths, 64, 4, 0)


def test_shares_of_one_change_nothing():
    plain = lengths_of(50)
    shared = dataclasses.replace(plain, share=np.ones(len(plain.tokens), np.float32))
    for name in ("rows", "units", "sequences"):
        np.testing.assert_array_equal(getattr(plan_epoch(plain, 64, 4), name), getattr(plan_epoch(shared, 64, 4), name))
