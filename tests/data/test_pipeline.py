"""From a configuration to batches. Axis letters as in vlm_jax/batch.py."""

import dataclasses
import logging
from pathlib import Path

import numpy as np
import pytest
from data_helpers import parts, picture, processor_of, run_config, write_lines
from PIL import Image

from vlm_jax.batch import Batch
from vlm_jax.config import AugmentConfig, DataConfig, JsonLinesConfig, SampleRule
from vlm_jax.data.pipeline import TrainBatches, build_source, eval_batches, tokens_of
from vlm_jax.errors import DataError
from vlm_jax.processing.layout import prefix_ends, targets_of
from vlm_jax.training.processors import TOKENIZER, build_processor

# A Flamingo row has no visual tokens among its own, and its frames have one size.
ABSENT = ("visual", "sizes", "features", "prefix_segments", "preference")  # of such runs
FIELDS = [field.name for field in dataclasses.fields(Batch) if field.name not in ABSENT]
replace = dataclasses.replace


def train(data: DataConfig, steps=6, seed=0, start=0, index=0, count=1) -> list[Batch]:
    with TrainBatches(
        run_config(data, steps, seed), *parts(data), start=start, process_index=index, process_count=count
    ) as batches:
        return list(batches)


def assert_equal(one: list[Batch], other: list[Batch]):
    assert len(one) == len(other)
    for a, b in zip(one, other, strict=True):
        for name in FIELDS:
            np.testing.assert_array_equal(getattr(a, name), getattr(b, name), err_msg=name)


def segments_of(batch: Batch) -> list[dict[str, np.ndarray]]:
    """The segments of all rows, each with its row's number and the arrays of its tokens."""
    found = []
    for row in range(len(batch.tokens)):
        for segment in range(1, batch.segments[row].max() + 1):
            place = np.flatnonzero(batch.segments[row] == segment)
            assert (np.diff(place) == 1).all()  # contiguous
            found.append({name: getattr(batch, name)[row, place] for name in FIELDS if name not in ("images", "frames")})
            found[-1]["row"] = row
    return found


def test_shapes_and_types(jsonl_config):
    batch = train(jsonl_config, steps=1)[0]
    row = (4, 160)
    expected = dict.fromkeys(FIELDS, (row, "int32")) | {
        "images": ((4, 3, 1, 8, 8, 3), "uint8"),
        "frames": ((4, 3), "int32"),
        "weights": (row, "float32"),
    }
    assert {name: (getattr(batch, name).shape, getattr(batch, name).dtype.name) for name in FIELDS} == expected
    assert all(getattr(batch, name) is None for name in ABSENT)


def test_a_row_holds_its_sequences_and_their_pictures(jsonl_config):
    data = replace(jsonl_config, augment=AugmentConfig())
    processor, source = parts(data)
    wanted = {}
    for index in range(len(source)):
        for conversation in source[index].conversations:
            whole = processor.lay_out(conversation, [(8, 8)] * len(source[index].media))
            layout = whole.without_last()
            wanted[layout.tokens.tobytes()] = (index, layout, targets_of(whole, processor.spread.end_id))
    seen = []
    for batch in eval_batches(data, processor, source):
        assert (batch.segments[batch.tokens == 0] == 0).all()
        for name in ("positions", "media_last", "media_first", "prefix_end", "targets", "weights"):
            assert not getattr(batch, name)[batch.segments == 0].any()
        used = {row: set() for row in range(4)}
        for segment in segments_of(batch):
            index, layout, (targets, weights) = wanted[segment["tokens"].tobytes()]
            seen.append(index)
            np.testing.assert_array_equal(segment["positions"], np.arange(len(layout.tokens)))
            np.testing.assert_array_equal(segment["targets"], targets)
            np.testing.assert_array_equal(segment["weights"], weights)
            np.testing.assert_array_equal(segment["prefix_end"], prefix_ends(layout.flags, segment["positions"]))
            shift = segment["media_first"].max() - layout.media_first.max()
            for name in ("media_last", "media_first"):
                expected = getattr(layout, name)
                np.testing.assert_array_equal(segment[name], np.where(expected > 0, expected + shift, 0))
            for number, frames in enumerate(source[index].media):
                slot = shift + number
                grey = 20 * int(Path(frames[0]).stem[1:]) + 5  # which picture it is can be told from its colour
                assert (batch.images[segment["row"], slot, 0] == grey).all()
                assert batch.frames[segment["row"], slot] == 1
                used[segment["row"]].add(slot)
        for row, slots in used.items():
            assert sorted(slots) == list(range(len(slots)))
            assert not batch.images[row, len(slots) :].any() and not batch.frames[row, len(slots) :].any()
    assert sorted(seen) == list(range(12))


def test_questions_share_their_picture(easy_vqa_config):
    source = build_source(easy_vqa_config, "eval")
    processor = processor_of(replace(easy_vqa_config, vocab_size=300), source)
    tokenizer = processor.tokenizer
    batch = next(eval_batches(easy_vqa_config, processor, source))
    assert (batch.frames.sum(1) < batch.segments.max(1)).all()
    for row in range(8):
        slots = [s["media_first"][0] for s in segments_of(batch) if s["row"] == row]
        assert sorted(set(slots)) == list(range(1, batch.frames[row].sum() + 1))
        assert max(slots.count(slot) for slot in slots) in (2, 3, 4)
    first = segments_of(batch)[0]
    text = tokenizer.decode(first["tokens"])
    assert text.startswith("<BOS><image>") and " " in text
    learned = tokenizer.decode(first["targets"][first["weights"] > 0])
    assert learned.startswith(" ") and learned.endswith("<EOC>")


def test_every_sequence_once_an_epoch_and_every_epoch_another_order(jsonl_config):
    batches = train(jsonl_config, steps=40)
    tokens = [segment["tokens"].tobytes() for batch in batches for segment in segments_of(batch)]
    epochs = [tokens[start : start + 12] for start in range(0, len(tokens) - 12, 12)]
    assert len(epochs) > 4
    assert all(len(set(epoch)) == 12 for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == len(epochs)


def test_seeds_differ(jsonl_config):
    one, other = train(jsonl_config, seed=0)[0], train(jsonl_config, seed=1)[0]
    assert (one.tokens != other.tokens).any()


@pytest.mark.parametrize("count", [2, 4])
def test_the_global_batch_is_the_same_for_any_number_of_processes(jsonl_config, count):
    whole = train(jsonl_config)
    shares = [train(jsonl_config, index=index, count=count) for index in range(count)]
    field = lambda name, step: np.concatenate([getattr(share[step], name) for share in shares])
    joined = [Batch(**{name: field(name, step) for name in FIELDS}) for step in range(6)]
    assert_equal(joined, whole)


def test_rows_must_divide(jsonl_config):
    with pytest.raises(DataError, match=r"data\.rows=4 does not divide among 3 processes"):
        train(jsonl_config, count=3)


@pytest.mark.parametrize("workers", [1, 2])
def test_worker_processes_change_nothing(jsonl_config, workers):
    whole = train(jsonl_config)
    start = workers - 1
    assert_equal(train(replace(jsonl_config, workers=workers), start=start), whole[start:])


def test_resuming_anywhere_equals_an_undisturbed_run(jsonl_config):
    whole = train(jsonl_config, steps=20)
    for start in (1, 7, 19, 20):
        assert_equal(train(jsonl_config, steps=20, start=start), whole[start:])


def test_position_is_the_next_step(jsonl_config):
    with TrainBatches(run_config(jsonl_config), *parts(jsonl_config), start=2) as batches:
        assert batches.position == 2
        next(batches)
        assert batches.position == 3  # however far the threads have read ahead
        assert len(list(batches)) == 3 and batches.position == 6
    batches.close()
    assert list(batches) == []


def test_augmentation_differs_by_epoch_and_seed_only(jsonl_config, folder):
    rng = np.random.default_rng(0)
    from PIL import Image

    for index in range(12):
        Image.fromarray(rng.integers(0, 256, (8, 8, 3)).astype(np.uint8)).save(folder / f"p{index}.png")
    changed, plain = train(jsonl_config, steps=2), train(replace(jsonl_config, augment=AugmentConfig()), steps=2)
    assert (changed[0].images != plain[0].images).any()
    np.testing.assert_array_equal(changed[0].tokens, plain[0].tokens)
    assert_equal(train(jsonl_config, steps=2), changed)
    evaluated = next(eval_batches(jsonl_config, *parts(jsonl_config)))
    originals = {image.tobytes() for image in np.concatenate([batch.images for batch in plain]).reshape(-1, 8, 8, 3)}
    assert {image.tobytes() for image in evaluated.images.reshape(-1, 8, 8, 3)} <= originals


def test_blank_images(jsonl_config):
    shown, blank = train(jsonl_config), train(replace(jsonl_config, blank_images=True))
    for a, b in zip(shown, blank, strict=True):
        np.testing.assert_array_equal(a.frames, b.frames)
        np.testing.assert_array_equal(a.tokens, b.tokens)
        assert set(np.unique(b.images[b.frames > 0])) <= {128} and not b.images[b.frames == 0].any()


@pytest.mark.parametrize("count", [1, 2, 4])
def test_an_evaluation_is_whole_and_padded(jsonl_config, count):
    shares = [
        list(eval_batches(jsonl_config, *parts(jsonl_config), process_index=index, process_count=count))
        for index in range(count)
    ]
    assert len({len(share) for share in shares}) == 1
    assert all(batch.tokens.shape == (4 // count, 160) for share in shares for batch in share)
    tokens = [s["tokens"].tobytes() for share in shares for batch in share for s in segments_of(batch)]
    assert len(tokens) == len(set(tokens)) == 12


def test_part_of_an_evaluation(jsonl_config):
    data = replace(jsonl_config, images=2)
    whole = list(eval_batches(data, *parts(data)))
    some = list(eval_batches(data, *parts(data), max_rows=5))
    rows = sum(int((batch.segments.max(1) > 0).sum()) for batch in some)
    assert len(whole) >= 2 and len(some) == 2 and rows == 5
    np.testing.assert_array_equal(some[1].tokens[0], whole[1].tokens[0])


def test_text_alone_and_frames(tmp_path):
    for index in range(3):
        picture(tmp_path / f"f{index}.png", (50 * index + 50,) * 3)
    lines = [{"content": [{"text": "hello"}]}, {"content": [{"frames": [f"f{i}.png" for i in range(3)]}, {"text": "a video"}]}]
    write_lines(tmp_path / "x.jsonl", lines)
    path = str(tmp_path / "x.jsonl")
    data = DataConfig(
        source=JsonLinesConfig(train=path, eval=path),
        tokenizer="train",
        image_size=8,
        rows=1,
        tokens=16,
        images=1,
        frames=4,
        augment=AugmentConfig(colour=0.5),
    )
    text, film = eval_batches(replace(data, tokens=5), *parts(data))
    assert text.images.shape == film.images.shape == (1, 1, 4, 8, 8, 3)
    assert not text.images.any() and not text.frames.any() and text.weights.any() and not text.media_last.any()
    assert [int(film.images[0, 0, frame].mean()) for frame in range(4)] == [50, 100, 150, 0]
    assert film.frames.tolist() == [[3]] and film.media_last[0].max() == 1
    with pytest.raises(DataError, match=r"x\.jsonl:2: an image slot of 3 frames, and a slot has data\.frames=2"):
        next(eval_batches(replace(data, frames=2), *parts(data)))


def test_what_fits_in_no_row_is_named(jsonl_config, caplog):
    with pytest.raises(DataError, match=r"train\.jsonl:\d+: a conversation of \d+ tokens, and a row has data\.tokens=20"):
        train(replace(jsonl_config, tokens=20))
    with pytest.raises(DataError, match=r"train\.jsonl:3: 2 images, and a row has data\.images=1"):
        train(replace(jsonl_config, images=1))
    source = replace(jsonl_config.source, bad_lines="skip")
    data = replace(jsonl_config, images=1, source=source)
    tokens = {s["tokens"].tobytes() for batch in eval_batches(data, *parts(data)) for s in segments_of(batch)}
    assert len(tokens) == 8 and "4 of 12 examples are left out" in caplog.text


@pytest.mark.parametrize("workers", [0, 1])
def test_a_picture_cut_short_is_named(jsonl_config, folder, workers):
    cut_short(folder / "p7.png")
    with pytest.raises(DataError, match=r"train\.jsonl:\d+: picture .*p7\.png: is damaged or cut short"):
        train(replace(jsonl_config, workers=workers))


def cut_short(path: Path) -> None:
    """Its header is whole, and half of its pixels."""
    Image.effect_noise((64, 64), 50).convert("RGB").save(path)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])


@pytest.mark.parametrize("workers", [0, 1])
def test_broken_pixels_are_left_out_counted_and_reported(jsonl_config, folder, workers, caplog):
    """The same examples after a resume, and nothing else of their rows is missing."""
    cut_short(folder / "p7.png")  # of lines 3 and 8
    source = replace(jsonl_config.source, bad_lines="skip")
    data = replace(jsonl_config, workers=workers, source=source, augment=AugmentConfig())
    processor, examples = parts(data)
    with TrainBatches(run_config(data), processor, examples) as batches:
        whole = list(batches)
        assert batches.left_out > 0
    assert "left out: " in caplog.text and "p7.png: is damaged or cut short" in caplog.text
    assert_equal(whole[2:], train(data, start=2))
    learned = lambda batches: {tuple(s["targets"][s["weights"] > 0]) for batch in batches for s in segments_of(batch)}
    store = tokens_of(data, processor, examples)
    kept = {tuple(store.written(i).tokens.tolist()) for i in range(len(store)) if store.example[i] not in (2, 7)}
    shown = [s["tokens"] for batch in eval_batches(data, processor, examples) for s in segments_of(batch)]
    assert sorted(map(len, shown)) == sorted(len(tokens) - 1 for tokens in kept)
    assert learned(eval_batches(data, processor, examples)) <= learned(whole)


def test_all_pictures_are_checked_before_the_first_step_if_asked(jsonl_config, folder, caplog):
    cut_short(folder / "p7.png")
    data = replace(jsonl_config, check_pictures=True)
    processor, examples = parts(data)
    with pytest.raises(DataError, match=r"train\.jsonl:3: picture .*p7\.png: is damaged or cut short"):
        tokens_of(data, processor, examples)
    skipping = replace(data, source=replace(data.source, bad_lines="skip"))
    with TrainBatches(run_config(skipping), *parts(skipping)) as batches:
        list(batches)
        assert batches.left_out == 0
    assert "2 of 12 examples are left out" in caplog.text


def test_without_that_it_says_what_was_checked(jsonl_config, caplog):
    with caplog.at_level(logging.INFO):
        tokens_of(jsonl_config, *parts(jsonl_config))
    assert "pictures: their headers were read; --config.data.check_pictures=True decodes them all" in caplog.text


@pytest.mark.parametrize("bad_lines", ["error", "skip"])
def test_a_picture_that_was_changed_or_removed_ends_the_run(jsonl_config, folder, bad_lines):
    """A disk that is gone must not look like broken pictures."""
    data = replace(jsonl_config, source=replace(jsonl_config.source, bad_lines=bad_lines))
    tokens_of(data, *parts(data))
    Image.effect_noise((8, 8), 50).convert("RGB").save(folder / "p7.png")  # of the same size
    with pytest.raises(DataError, match=r"p7\.png was changed since it was tokenised: delete"):
        train(data)
    (folder / "p7.png").unlink()
    with pytest.raises(DataError, match=r"p7\.png: there is no such file"):
        train(data)


def test_the_tokenizer_is_kept(jsonl_config, tmp_path):
    source = build_source(jsonl_config, "train")
    first = build_processor(jsonl_config, source, tmp_path / "run").tokenizer
    again = build_processor(replace(jsonl_config, vocab_size=270), source, tmp_path / "run").tokenizer
    assert again.vocab_size == first.vocab_size
    assert build_processor(replace(jsonl_config, vocab_size=270), source, tmp_path / "other").tokenizer.vocab_size == 270
    named = replace(jsonl_config, tokenizer=str(tmp_path / "run" / TOKENIZER))
    loaded = build_processor(named, source, tmp_path / "third").tokenizer
    assert loaded.encode("what 3") == first.encode("what 3")


def test_sampling_thins_the_training_and_not_the_evaluation(jsonl_config):
    """The first rule that matches a sequence's text counts: 10 and 11 are met by the first, 1 by the second alone."""
    rules = (SampleRule(pattern=r"what 1\d", share=1.0), SampleRule(pattern=r"what 1", share=1e-6))
    thinned = replace(jsonl_config, sampling=rules, augment=AugmentConfig(), workers=0)
    processor, source = parts(thinned)

    def texts(batches):
        return {processor.tokenizer.decode(segment["tokens"].tolist()) for b in batches for segment in segments_of(b)}

    everything = texts(eval_batches(thinned, processor, source))
    missing = everything - texts(train(thinned, steps=12))
    assert [text.count("what 1 ") > 0 for text in missing] == [True]
    assert everything == texts(eval_batches(jsonl_config, processor, source)) == texts(train(jsonl_config, steps=12))


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (SampleRule(pattern="(", share=0.5), r"data\.sampling: pattern '\(': missing \)"),
        (SampleRule(pattern="x", share=0.0), r"data\.sampling: share 0\.0 of 'x': expected above 0 and at most 1"),
        (SampleRule(pattern="x", share=1.5), r"data\.sampling: share 1\.5"),
    ],
)
def test_a_sampling_rule_that_is_none(jsonl_config, rule, message):
    with pytest.raises(DataError, match=message):
        train(replace(jsonl_config, sampling=(rule,)))
