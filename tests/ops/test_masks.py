import jax
import numpy as np
import pytest

from vlm_jax.ops.masks import alibi_bias, alibi_slopes, causal_mask, media_mask

# Images at places 2 and 5 of 8 tokens: what `open_flamingo/src/helpers.py` gives, rows image 1 and image 2.
LAST = np.array([[0, 0, 1, 1, 1, 0, 0, 0], [0, 0, 0, 0, 0, 1, 1, 1]], bool).T
ALL_PREVIOUS = np.array([[0, 0, 1, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 1, 1, 1]], bool).T
MEDIA_LAST = np.array([[0, 0, 1, 1, 1, 2, 2, 2]])


@pytest.mark.parametrize(("mode", "expected"), [("last", LAST), ("all_previous", ALL_PREVIOUS)])
@pytest.mark.parametrize("first_of_blind_tokens", [0, 1])
def test_openflamingos_table(mode, expected, first_of_blind_tokens):
    first = np.where(MEDIA_LAST > 0, 1, first_of_blind_tokens)
    seen = jax.jit(media_mask, static_argnums=(2, 3))(first, MEDIA_LAST, 2, mode)
    np.testing.assert_array_equal(seen[0], expected)


def test_all_previous_images_are_those_of_the_segment():
    first, last = np.array([[1, 1, 3, 3, 3]]), np.array([[1, 2, 0, 3, 4]])
    seen = media_mask(first, last, 4, "all_previous")
    expected = [[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 0, 0], [0, 0, 1, 0], [0, 0, 1, 1]]
    np.testing.assert_array_equal(seen[0], np.array(expected, bool))


def test_an_unknown_media_mode_is_an_error():
    with pytest.raises(ValueError, match="'some': expected 'last', 'all_previous' or"):
        media_mask(MEDIA_LAST, MEDIA_LAST, 2, "some")


@pytest.mark.parametrize("window", [None, 1, 3])
def test_a_token_sees_its_segment_up_to_itself_and_not_beyond_the_window(window):
    segments = np.array([[0, 1, 1, 1, 1, 2, 2, 0], [1] * 8])
    positions = np.array([[0, 0, 1, 2, 3, 0, 1, 0], list(range(8))])
    mask = np.asarray(causal_mask(positions, positions, segments, segments, window))
    for row, t, s in np.ndindex(mask.shape):
        back = positions[row, t] - positions[row, s]
        same = segments[row, t] == segments[row, s] != 0
        assert mask[row, t, s] == (same and 0 <= back < (window or 99)), (row, t, s)


def test_published_alibi_slopes():
    assert alibi_slopes(8, 8.0) == [2.0**-i for i in range(1, 9)]
    # `get_slopes(12)` of the authors: the 8 of a power of two, then every second one of 16 heads.
    more = [0.7071067811865476, 0.35355339059327384, 0.17677669529663692, 0.08838834764831849]
    np.testing.assert_allclose(alibi_slopes(12, 8.0), [2.0**-i for i in range(1, 9)] + more, rtol=1e-12)
    assert alibi_slopes(1, 8.0) == [2.0**-8]


def test_the_alibi_bias_is_minus_slope_times_distance():
    q, k = np.array([[4, 5], [0, 1]]), np.array([[3, 4, 5], [0, 1, 2]])
    bias = np.asarray(alibi_bias(q, k, 8, 8.0))
    assert bias.shape == (2, 8, 2, 3)
    np.testing.assert_array_equal(bias[0, 0], [[-0.5, 0, 0.5], [-1, -0.5, 0]])
    np.testing.assert_array_equal(bias[1, 7] * 256, [[0, 1, 2], [-1, 0, 1]])
