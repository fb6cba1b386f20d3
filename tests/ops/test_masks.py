import jax
import numpy as np
import pytest

from vlm_jax.ops.masks import alibi_of, alibi_slopes, causal_mask, media_mask

# Images at places 2 and 5 of 8 tokens: what `open_flamingo/src/helpers.py` gives, rows image 1 and image 2.
LAST = np.array([[0, 0, 1, 1, 1, 0, 0, 0], [0, 0, 0, 0, 0, 1, 1, 1]], bool).T
ALL_PREVIOUS = np.array([[0, 0, 1, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 1, 1, 1]], bool).T
MEDIA_LAST = np.array([[0, 0, 1, 1, 1, 2, 2, 2]])


@pytest.mark.parametrize(("mode", "expected"), [("last", LAST), ("all_previous", ALL_PREVIOUS)])
@pytest.mark.parametrize("first_of_blind_tokens", [0, 1])
def test_openflamingos_table(mode, expected, first_of_blind_tokens):
    first = np.where(MEDIA_LAST > 0, 1, first_of_blind_tokens)
    seen = jax.jit(lambda first: media_mask(first, MEDIA_LAST, 2, mode).dense())(first)
    np.testing.assert_array_equal(seen[0], expected)


def test_all_previous_images_are_those_of_the_segment():
    first, last = np.array([[1, 1, 3, 3, 3]]), np.array([[1, 2, 0, 3, 4]])
    seen = media_mask(first, last, 4, "all_previous").dense()
    expected = [[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 0, 0], [0, 0, 1, 0], [0, 0, 1, 1]]
    np.testing.assert_array_equal(seen[0], np.array(expected, bool))


def test_text_before_the_first_image_sees_all_of_its_segment():
    """Two conversations with images in a row, one without, padding: OpenFlamingo's quirk stays within each."""
    segments = np.array([[1, 1, 1, 1, 2, 2, 3, 3, 0]])
    first = np.array([[1, 1, 1, 1, 3, 3, 0, 0, 0]])
    last = np.array([[0, 1, 1, 2, 0, 3, 0, 0, 0]])
    seen = media_mask(first, last, 4, "all_previous_uniform", segments=segments).dense()[0]
    table = {0: "1100", 1: "1000", 2: "1000", 3: "1100", 4: "0010", 5: "0010", 6: "0000", 7: "0000", 8: "0000"}
    assert {place: "".join(map(str, row)) for place, row in enumerate(seen.astype(int).tolist())} == table
    alone = media_mask(first[:, :4], last[:, :4], 4, "all_previous_uniform").dense()
    np.testing.assert_array_equal(alone[0], seen[:4])


def test_a_slot_of_several_tokens():
    one, three = (media_mask(MEDIA_LAST, MEDIA_LAST, 2, "last", tokens=tokens).dense()[0] for tokens in (1, 3))
    np.testing.assert_array_equal(np.repeat(one, 3, axis=-1), three)


def test_an_unknown_media_mode_is_an_error():
    with pytest.raises(ValueError, match="'some': expected 'last', 'all_previous' or"):
        media_mask(MEDIA_LAST, MEDIA_LAST, 2, "some")


@pytest.mark.parametrize("window", [None, 1, 3])
def test_a_token_sees_its_segment_up_to_itself_and_not_beyond_the_window(window):
    segments = np.array([[0, 1, 1, 1, 1, 2, 2, 0], [1] * 8])
    positions = np.array([[0, 0, 1, 2, 3, 0, 1, 0], list(range(8))])
    mask = np.asarray(causal_mask(positions, positions, segments, segments, window).dense())
    for row, t, s in np.ndindex(mask.shape):
        back = positions[row, t] - positions[row, s]
        same = segments[row, t] == segments[row, s] != 0
        assert mask[row, t, s] == (same and 0 <= back < (window or 99)), (row, t, s)


@pytest.mark.parametrize("window", [None, 2])
def test_a_prompt_sees_to_its_own_end(window):
    """big_vision's table of a prefix: two turns, and a second segment that begins with its answer."""
    segments = np.array([[1, 1, 1, 1, 1, 1, 2, 2]])
    positions = np.array([[0, 1, 2, 3, 4, 5, 0, 1]])
    ends = np.array([[1, 1, 2, 4, 4, 5, 0, 1]])  # prompts are places 0-1 and 3-4
    rows = ("11000000", "11000000", "11100000", "11111000", "11111000", "11111100", "00000010", "00000011")
    expected = np.array([[int(digit) for digit in row] for row in rows], bool)
    if window:
        expected &= positions[0][:, None] - positions[0] < window
    mask = causal_mask(positions, positions, segments, segments, window, ends).dense()
    np.testing.assert_array_equal(mask[0], expected)
    # The last places alone against all keys, as with a cache.
    some = causal_mask(positions[:, 5:], positions, segments[:, 5:], segments, window, ends[:, 5:]).dense()
    np.testing.assert_array_equal(some[0], expected[5:])


def test_published_alibi_slopes():
    assert alibi_slopes(8, 8.0) == [2.0**-i for i in range(1, 9)]
    # `get_slopes(12)` of the authors: the 8 of a power of two, then every second one of 16 heads.
    more = [0.7071067811865476, 0.35355339059327384, 0.17677669529663692, 0.08838834764831849]
    np.testing.assert_allclose(alibi_slopes(12, 8.0), [2.0**-i for i in range(1, 9)] + more, rtol=1e-12)
    assert alibi_slopes(1, 8.0) == [2.0**-8]


def test_the_alibi_bias_is_minus_slope_times_distance():
    q, k = np.array([[4, 5], [0, 1]]), np.array([[3, 4, 5], [0, 1, 2]])
    bias = np.asarray(alibi_of(q, k, 8, 8.0).dense())
    assert bias.shape == (2, 8, 2, 3)
    np.testing.assert_array_equal(bias[0, 0], [[-0.5, 0, 0.5], [-1, -0.5, 0]])
    np.testing.assert_array_equal(bias[1, 7] * 256, [[0, 1, 2], [-1, 0, 1]])
