"""Ranking captions from a cache: the likelihoods of each pair computed alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from evaluator_helpers import CAPTIONS, known

from vlm_jax.batch import Batch
from vlm_jax.config import RankingConfig
from vlm_jax.data.rows import empty_rows
from vlm_jax.processing.batching import put_media, put_sequence
from vlm_jax.processing.layout import targets_of
from vlm_jax.training.evaluators.ranking import Ranking


def alone(parts, state):
    """[pictures, captions], every pair a row of a training batch."""
    processor, config = parts.processor, parts.config
    model, rows = parts.trainer.model, []
    for number in range(len(CAPTIONS)):
        example = parts.held_out[number]
        (before, _), tiles = example.conversations[0], [processor.media.pixels(medium) for medium in example.media]
        for caption in CAPTIONS:
            answered = (before, *parts.held_out[CAPTIONS.index(caption)].conversations[0][1:])
            layout = processor.lay_out(answered, [(16, 16)])
            row = {name: array[0] for name, array in empty_rows(config.data, 1).items()}
            put_media(row, tiles, slot=0, in_sequence=processor.media.tile_tokens > 0)
            targets, weights = targets_of(layout, processor.spread.end_id)
            row["targets"][: len(targets)], row["weights"][: len(weights)] = targets, weights
            put_sequence(row, layout.without_last(), 0, slot=0, segment=1, tile_tokens=processor.media.tile_tokens)
            rows.append(row)

    @jax.jit
    def score(batch):
        log_p = jax.nn.log_softmax(model.apply({"params": state.params}, batch))
        return jnp.sum(jnp.take_along_axis(log_p, batch.targets[..., None], axis=-1)[..., 0] * batch.weights, axis=1)

    stacked = Batch(**{name: np.stack([row[name] for row in rows]) for name in rows[0]})
    return np.asarray(score(stacked)).reshape(len(CAPTIONS), -1)


@pytest.mark.parametrize("in_sequence, mesh", [(False, (1, 1, 1)), (True, (2, 2, 2))], ids=["cross_attention", "in_sequence"])
def test_scores_are_those_of_each_pair_alone(folder, in_sequence, mesh):
    parts, state = known(folder, in_sequence=in_sequence, mesh=mesh)
    with jax.set_mesh(parts.trainer.mesh):
        scores, beyond = Ranking(RankingConfig(rows=8), parts).scores(state)
        expected = alone(parts, state)
    assert np.ptp(expected, axis=0).max() > 0.1  # the pictures matter
    np.testing.assert_allclose(scores, expected, rtol=1e-4, atol=1e-4)
    prior = np.log(np.mean(np.exp(expected.astype(np.float64)), axis=0))
    np.testing.assert_allclose(beyond, expected - prior, rtol=1e-4, atol=1e-4)


def test_recall_of_both_scores_and_that_of_chance(folder):
    parts, state = known(folder, in_sequence=False, mesh=(1, 1, 1))
    ranking = Ranking(RankingConfig(rows=8), parts)
    with jax.set_mesh(parts.trainer.mesh):
        scores, beyond = ranking.scores(state)
        found = ranking.evaluate(state)
        grey = Ranking(RankingConfig(rows=8, blank=True), parts).evaluate(state)
    places = lambda values: (values > np.diag(values)[:, None]).sum(axis=1)
    for prefix, values in {"": scores, "prior_": beyond}.items():
        for k in (1, 5, 10):
            assert found.metrics[f"{prefix}r{k}"] == pytest.approx(np.mean(places(values) < k))
            assert grey.metrics[f"{prefix}r{k}"] == pytest.approx(k / len(CAPTIONS))
    assert "12 pictures, 12 captions" in found.line and "(blank)" in grey.line


def test_fewer_captions_and_the_mean_of_a_caption(folder):
    parts, state = known(folder, in_sequence=False, mesh=(1, 1, 1))
    with jax.set_mesh(parts.trainer.mesh):
        whole = Ranking(RankingConfig(rows=8), parts).scores(state)[0]
        some = Ranking(RankingConfig(rows=8, captions=4, pictures=2, score="mean"), parts).scores(state)[0]
    tokens = [parts.processor.tokenizer.encode(f" {caption}") for caption in CAPTIONS]
    chosen = [0, 4, 7, 11]
    expected = whole[np.ix_([0, 11], chosen)] / [len(tokens[place]) + 1 for place in chosen]  # and the end token
    np.testing.assert_allclose(some, expected, rtol=1e-4)


def test_shown_examples_are_read(folder):
    """A few-shot prompt has its examples' pictures too."""
    parts, state = known(folder, in_sequence=False, mesh=(1, 1, 1))
    some = dict(rows=8, captions=3, pictures=2)
    with jax.set_mesh(parts.trainer.mesh):
        plain = Ranking(RankingConfig(**some), parts).scores(state)
        shown = [Ranking(RankingConfig(**some, shots=1, seed=seed), parts).scores(state) for seed in (0, 0, 1)]
    assert plain[1].shape == shown[0][1].shape == (2, 3)
    np.testing.assert_array_equal(shown[0], shown[1])
    for one, other in ((plain, shown[0]), (shown[0], shown[2])):
        assert all(np.abs(a - b).max() > 1e-3 for a, b in zip(one, other, strict=True))
