"""The recipes' own pictures: what becomes of pixels, and how many visual tokens stand for them."""

import numpy as np
import pytest

from vlm_jax.errors import RequestError
from vlm_jax.processing.media import FittedMedia
from vlm_jax.processing.pictures import ImageError

GREY = np.full((4, 8, 3), 7, np.uint8)


def test_a_film_under_cross_attention_is_one_medium_of_its_frames():
    media = FittedMedia(8, "stretch", 0)
    assert [int(frame.mean()) for frame in media.pixels((GREY, GREY + 1))] == [7, 8]
    assert media.tiles((4, 8)) == 1


def test_a_film_has_no_place_in_the_sequence():
    # Its frames would take more slots than its visual tokens know of.
    media = FittedMedia(8, "stretch", 4)
    assert media.pixels((GREY,))[0].shape == (8, 8, 3) and media.runs((4, 8))[0].tolist() == [0, 1, 2, 3]
    with pytest.raises(RequestError, match="a video of 2 pictures"):
        media.pixels((GREY, GREY))


def test_blank_pictures_are_not_even_opened():
    assert (FittedMedia(8, "pad", 0, blank=True).pixels(("no such file",))[0] == 128).all()


def test_a_picture_that_does_not_fit_is_named(tmp_path):
    from PIL import Image

    Image.new("RGB", (100, 1)).save(tmp_path / "thin.png")
    with pytest.raises(ImageError, match=r"picture .*thin\.png: a picture of 100x1 is too thin"):
        FittedMedia(8, "pad", 0).pixels((str(tmp_path / "thin.png"),))
    with pytest.raises(ImageError, match=r"^picture .*none\.png: there is no such file"):
        FittedMedia(8, "pad", 0).pixels((str(tmp_path / "none.png"),))
