"""Several sources in one stream of rows."""

import collections
import dataclasses
import itertools

import numpy as np
import pytest
from data_helpers import byte_tokenizer, chat, parts, picture, run_config, write_lines

from vlm_jax.config import DataConfig, JsonLinesConfig, MemberConfig, MixtureConfig
from vlm_jax.config_dict import from_config_dict, to_config_dict
from vlm_jax.data import build_store
from vlm_jax.data.packing import PackedRows
from vlm_jax.data.pipeline import TrainBatches, build_source, eval_batches, tokens_of
from vlm_jax.errors import DataError

replace = dataclasses.replace
EXAMPLES = {"pictures": 10, "words": 6}


@pytest.fixture
def mixed(tmp_path):
    """Ten questions about a picture and six without, as a configuration of their weights."""
    picture(tmp_path / "a.png")
    write_lines(tmp_path / "pictures.jsonl", [chat(f"p{n}", "x", image="a.png") for n in range(10)])
    write_lines(tmp_path / "words.jsonl", [chat(f"w{n}", "x") for n in range(6)])

    def config(weights="epochs", evaluate=("pictures", "words"), **of):
        member = lambda name: JsonLinesConfig(
            train=str(tmp_path / f"{name}.jsonl"), eval=str(tmp_path / f"{name}.jsonl") * (name in evaluate)
        )
        members = (MemberConfig(name=n, source=member(n), weight=w, evaluate=n in evaluate) for n, w in of.items())
        return DataConfig(
            source=MixtureConfig(members=tuple(members), weights=weights),
            prompt="{question} ",
            answer="{answer}",
            vocab_size=261,
            image_size=8,
            rows=2,
            tokens=24,
            images=3,
            cache_dir=str(tmp_path / "cache"),
            workers=0,
        )

    return config


def questions(batches):
    """Of every sequence: "p3"; and of each row, how many of its sequences have a picture, and how many none."""
    found, rows = [], []
    for batch in batches:
        for row in range(len(batch.tokens)):
            seen = collections.Counter()
            for segment in range(1, batch.segments[row].max() + 1):
                here = batch.segments[row] == segment
                words = byte_tokenizer().decode(batch.tokens[row][here]).replace("<BOS>", "").replace("<image>", "")
                found.append(words.split()[0])
                seen[bool(batch.media_last[row][here].any())] += 1
                assert batch.media_last[row][here].any() == found[-1].startswith("p")
            rows.append((seen[True], seen[False]))
    return found, rows


def epochs(store, count=4, seed=0):
    """The conversations of some epochs."""
    return [sorted(store.lengths_to_pack.drawn(seed, epoch)[0].tolist()) for epoch in range(count)]


@pytest.mark.parametrize(
    ("weights", "of", "an_epoch"),
    [
        ("epochs", dict(pictures=0.5, words=2.0), (5, 12)),
        ("share", dict(pictures=1.0, words=3.0), (4, 12)),
        ("share", dict(words=300.0, pictures=100.0), (4, 12)),
    ],
)
def test_weights_are_epochs_or_shares(mixed, weights, of, an_epoch):
    config = mixed(weights, **of)
    store = tokens_of(config, *parts(config))
    for epoch in epochs(store):
        assert (sum(index < 10 for index in epoch), sum(index >= 10 for index in epoch)) == an_epoch


def test_a_member_is_drawn_again_only_when_all_of_it_was(mixed):
    config = mixed(pictures=0.3, words=1.5)
    store = tokens_of(config, *parts(config))
    drawn = list(itertools.chain(*epochs(store, 20)))
    assert collections.Counter(index < 10 for index in drawn) == {True: 60, False: 180}
    assert set(collections.Counter(drawn).values()) == {6, 30}  # of ten pictures and six texts, in 20 epochs
    assert epochs(store) != epochs(store, seed=1) and epochs(store)[0] != epochs(store)[1]


def test_phases_come_one_after_the_other_in_every_epoch(mixed):
    """All texts before all pictures, but for a row that both may be in; within a phase they are shuffled."""
    config = mixed(pictures=1.0, words=2.0)
    later = tuple(replace(member, phase=int(member.name == "pictures")) for member in config.source.members)
    phased = replace(config, source=replace(config.source, members=later))
    plan = lambda data, epoch: PackedRows(tokens_of(data, *parts(data)), 24, 3, 0, seed=0).plan(epoch)
    for epoch in range(3):
        rows = [np.concatenate(row) for row in plan(phased, epoch)]
        of_pictures = [set((row < 10).tolist()) for row in rows]
        assert [one for one in of_pictures if one == {True}] == of_pictures[-len([1 for o in of_pictures if o == {True}]) :]
        assert sum(one == {True, False} for one in of_pictures) <= 1 and of_pictures[0] == {False}
        together = lambda rows: sorted(np.concatenate(rows).tolist())
        assert together(rows) == together([np.concatenate(row) for row in plan(config, epoch)])
    first = lambda epoch: plan(phased, epoch)[0][0].tolist()
    assert len({tuple(first(epoch)) for epoch in range(5)}) > 1


def test_members_are_packed_together_and_repeated_draws_are_sequences_of_their_own(mixed):
    config = mixed(pictures=1.0, words=2.0)
    processor, source = parts(config)
    found, rows = questions(TrainBatches(run_config(config, 30), processor, source))
    assert any(with_picture and without for with_picture, without in rows)
    first = found[:22]
    assert collections.Counter(first) == {f"p{n}": 1 for n in range(10)} | {f"w{n}": 2 for n in range(6)}
    assert all(with_picture <= config.images for with_picture, _ in rows)


def test_resuming_anywhere_and_the_order_of_the_members_change_nothing(mixed):
    config = mixed(pictures=0.4, words=1.7)
    other = mixed(words=1.7, pictures=0.4)
    whole = list(TrainBatches(run_config(config, 20), *parts(config)))
    for start, again in ((0, other), (1, config), (13, other), (20, config)):
        resumed = list(TrainBatches(run_config(again, 20), *parts(again), start=start))
        assert len(resumed) == 20 - start
        for one, two in zip(resumed, whole[start:], strict=True):
            np.testing.assert_array_equal(one.tokens, two.tokens)
            np.testing.assert_array_equal(one.images, two.images)


def test_another_weight_tokenises_nothing(mixed, monkeypatch):
    first = mixed(pictures=1.0, words=1.0)
    processor, source = parts(first)
    before = tokens_of(first, processor, source).folder
    monkeypatch.setattr(build_store, "_StoreBuilder", lambda *_, **__: pytest.fail("tokenised again"))
    other = mixed(pictures=0.1, words=1.0)
    assert tokens_of(other, processor, build_source(other, "train")).folder != before
    alone = replace(other, source=other.source.members[0].source)
    assert len(tokens_of(alone, processor, build_source(alone, "train"))) == 10


def test_an_evaluation_has_every_held_out_example_once(mixed):
    config = mixed(pictures=0.1, words=5.0)
    processor, _ = parts(config)
    held_out = build_source(config, "eval")
    assert sorted(questions(eval_batches(config, processor, held_out))[0]) == [
        *(f"p{n}" for n in range(10)),
        *(f"w{n}" for n in range(6)),
    ]
    part = mixed(pictures=0.1, words=5.0, evaluate=("words",))
    assert list(build_source(part, "eval").members) == ["words"] and len(build_source(part, "train")) == 16


def test_members_are_named_on_the_command_line(mixed):
    config = mixed(pictures=1.0, words=1.0)
    flags = to_config_dict(config)
    flags.source.members.words.weight = 3.0
    back = from_config_dict(DataConfig, flags)
    assert back == mixed(pictures=1.0, words=3.0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(weight=0.0), r"members\.a\.weight=0\.0: expected a number above 0"),
        (dict(name="x/y"), r"members\.x/y: expected names"),
        (dict(source=JsonLinesConfig(train="none.jsonl", eval="")), r"members\.a: none\.jsonl: there is no such file"),
        (dict(source=MixtureConfig(members=())), r"members\.a: is a mixture itself"),
        (dict(source=JsonLinesConfig(train="", eval="", bad_lines="skip")), r"members\.a\.source\.bad_lines"),
    ],
)
def test_a_wrong_member_is_named(mixed, change, message):
    member = replace(MemberConfig(name="a", source=JsonLinesConfig(train="", eval="")), **change)
    config = replace(mixed(pictures=1.0), source=MixtureConfig(members=(member,)))
    with pytest.raises(DataError, match=message):
        build_source(config, "train")
    with pytest.raises(DataError, match="members is empty"):
        build_source(replace(config, source=MixtureConfig(members=())), "train")
