"""A sequence gives the same numbers whole, in pieces with the cache, padded on the left, and packed with others."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from tests.tiny import VOCAB, random_batch, random_params, tiny_model
from vlm_jax.batch import Batch
from vlm_jax.config import AlibiConfig, LearnedPositionsConfig
from vlm_jax.models.vlm import VisionLanguageModel

VARIANTS = {  # what changes in (language, fusion); all have grouped-query attention
    "rope": ({}, {}),
    "window": ({"window": 3}, {"media": "all_previous"}),
    "alibi": ({"positions": AlibiConfig()}, {"every": 3, "offset": 2}),
    "learned": ({"positions": LearnedPositionsConfig(offset=2), "max_positions": 16}, {"every": 1}),
}
SLOTS = 3
TOLERANCE = {"atol": 1e-4, "rtol": 1e-4}
variants = pytest.mark.parametrize("variant", VARIANTS)


def config_of(variant):
    language, fusion = VARIANTS[variant]
    config = tiny_model()
    language = dataclasses.replace(config.language, **language)
    return dataclasses.replace(config, language=language, fusion=dataclasses.replace(config.fusion, **fusion))


@functools.cache
def model(variant):
    """The model, random parameters, and the jitted full forward pass."""
    module = VisionLanguageModel(config_of(variant))
    params = random_params(module, random_batch(1))
    return module, params, jax.jit(lambda batch: module.apply({"params": params}, batch))


IMAGES = np.random.default_rng(5).integers(0, 256, (SLOTS, 1, 16, 16, 3), dtype=np.uint8)
# Sequences: the image slot that each token sees, and the first slot of the sequence. The first two share an image.
SEQUENCES = [([0, 1, 1, 2, 2, 2], 1), ([2, 2, 2, 2], 2), ([0, 0, 3], 3), ([0, 0, 0, 0, 0], 0)]


def tokens_of(index):
    return np.random.default_rng(index).integers(1, VOCAB, len(SEQUENCES[index][0]))


LENGTH = 20


def rows_of(*rows, length=LENGTH):
    """Rows of (is it padding, number of padding tokens or sequence) -> a batch in which every row has all images."""
    fields = {name: np.zeros((len(rows), length), np.int32) for name in ("tokens", "positions", "segments", "last", "first")}
    for r, row in enumerate(rows):
        at = segment = 0
        for pad, item in row:
            if pad:
                at += item
                continue
            last, first = SEQUENCES[item]
            here, segment = np.s_[r, at : at + len(last)], segment + 1
            fields["tokens"][here], fields["positions"][here] = tokens_of(item), np.arange(len(last))
            fields["segments"][here], fields["last"][here], fields["first"][here] = segment, last, first
            at += len(last)
    last, first = fields.pop("last"), fields.pop("first")
    return Batch(
        images=np.repeat(IMAGES[None], len(rows), axis=0),
        frames=np.ones((len(rows), SLOTS), np.int32),
        media_last=last,
        media_first=first,
        prefix_end=fields["positions"],
        targets=fields["tokens"],
        weights=np.ones(last.shape, np.float32),
        **fields,
    )


PAD = lambda count: (True, count)
SEQUENCE = lambda index: (False, index)


@functools.cache
def alone(variant):
    """Logits of each sequence in a row of its own."""
    logits = np.asarray(model(variant)[2](rows_of(*([SEQUENCE(index)] for index in range(4)))))
    return [row[: len(last)] for row, (last, _) in zip(logits, SEQUENCES, strict=True)]


def on_the_left():
    return rows_of(*([PAD(LENGTH - len(last)), SEQUENCE(index)] for index, (last, _) in enumerate(SEQUENCES)))


def test_padding_on_the_right_changes_nothing():
    logits = model("rope")[2](rows_of([SEQUENCE(0)], length=len(SEQUENCES[0][0])))
    np.testing.assert_allclose(logits[0], alone("rope")[0], **TOLERANCE)


@variants
def test_a_packed_row_is_each_sequence_alone(variant):
    orders = [[0, 1, 2, 3], [3, 2, 1, 0], [1, 3, 0, 2], [2, 0, 3, 1]]
    batch = rows_of(*([SEQUENCE(index) for index in order] for order in orders))
    packed = np.asarray(model(variant)[2](batch))
    assert np.isfinite(packed).all()
    for row, order in zip(packed, orders, strict=True):
        expected = np.concatenate([alone(variant)[index] for index in order])
        np.testing.assert_allclose(row[: len(expected)], expected, **TOLERANCE)


@variants
def test_padding_on_the_left_changes_nothing(variant):
    padded = np.asarray(model(variant)[2](on_the_left()))
    for row, expected in zip(padded, alone(variant), strict=True):
        np.testing.assert_allclose(row[-len(expected) :], expected, **TOLERANCE)


@functools.cache
def reader(variant):
    """Reads a piece of a batch: (piece, visual tokens, media_cache, cache) -> (logits, cache)."""
    module, params, _ = model(variant)
    apply = lambda method, *args, **named: module.apply({"params": params}, *args, **named, method=method)

    @jax.jit
    def look(batch):
        visual = apply("visual_tokens", batch)
        return visual, apply("media_cache", visual)

    @jax.jit
    def read(piece, visual, media_cache, cache):
        out = apply("forward", piece, visual=visual, media_cache=media_cache, cache=cache, return_cache=True)
        return apply("logits", out.hidden), out.cache

    return look, read


def in_pieces(variant, batch, sizes, spare=3):
    """Logits [B, T, V] of a batch that is read in pieces, with a cache larger than needed."""
    look, read = reader(variant)
    length = batch.tokens.shape[1]
    (visual, media_cache), cache, logits, at = look(batch), None, [], 0
    names = ("tokens", "positions", "segments", "media_first", "media_last", "prefix_end")
    for size in sizes:
        piece = Batch(**{name: getattr(batch, name)[:, at : at + size] for name in names})
        some, cache = read(piece, visual, media_cache, cache)
        cache = cache.with_slots(length + spare)
        logits.append(np.asarray(some))
        at += size
    assert at == length
    np.testing.assert_array_equal(cache.used, (batch.segments > 0).sum(axis=1))
    return np.concatenate(logits, axis=1)


@variants
@pytest.mark.parametrize("sizes", [[LENGTH - 4, 1, 1, 1, 1], [1] * 16 + [4]], ids=["prefill and tokens", "tokens and a piece"])
def test_pieces_with_the_cache_are_the_whole_row(variant, sizes):
    """Rows of several lengths: each is written behind its own tokens."""
    batch = rows_of(*([SEQUENCE(index)] for index in range(4)))
    for row, expected in zip(in_pieces(variant, batch, sizes), alone(variant), strict=True):
        np.testing.assert_allclose(row[: len(expected)], expected, **TOLERANCE)


def test_a_window_hides_what_lies_further_back():
    module, params, forward = model("window")
    batch = rows_of(*[[SEQUENCE(3)]] * 4)
    changed = dataclasses.replace(batch, tokens=batch.tokens.copy())
    changed.tokens[0, 0] += 1
    # Three layers of a window of 3 carry a token six places on; one layer two places.
    assert np.any(np.asarray(forward(changed) - forward(batch))[0, :5], axis=-1).all()
    language = dataclasses.replace(module.config.language, layers=1)
    first = params["language"] | {"layers": jax.tree.map(lambda p: p[:1], params["language"]["layers"])}
    one = VisionLanguageModel(dataclasses.replace(module.config, vision=None, connector=None, fusion=None, language=language))
    apply = jax.jit(lambda batch: one.apply({"params": {"language": first}}, batch))
    moved = np.any(np.asarray(apply(changed) - apply(batch)), axis=-1)
    np.testing.assert_array_equal(moved[0, :5], [True, True, True, False, False])
