"""Every kind of picture file a user may have; axis letters as in vlm_jax/processing/pictures.py."""

import io

import numpy as np
import pytest
from PIL import Image

from vlm_jax.processing.pictures import PAD, ImageError, fit_image, open_picture, picture_size, read_image


def random_pixels(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3)).astype(np.uint8)


def saved(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def one_colour(data: bytes, colour, tolerance=0):
    image = read_image(data)
    assert image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3
    np.testing.assert_allclose(image.reshape(-1, 3).mean(0), colour, atol=tolerance)


def test_pixels_of_a_png_are_kept():
    pixels = random_pixels(5, 7)
    np.testing.assert_array_equal(read_image(saved(Image.fromarray(pixels))), pixels)


@pytest.mark.parametrize(
    ("image", "kind", "colour"),
    [
        (Image.new("L", (3, 2), 77), "PNG", (77, 77, 77)),
        (Image.new("1", (3, 2), 1), "PNG", (255, 255, 255)),
        (Image.new("LA", (3, 2), (77, 0)), "PNG", (255, 255, 255)),
        (Image.new("RGBA", (3, 2), (200, 0, 0, 0)), "PNG", (255, 255, 255)),
        (Image.new("RGBA", (3, 2), (200, 0, 0, 255)), "PNG", (200, 0, 0)),
        (Image.new("RGBA", (3, 2), (0, 0, 0, 51)), "PNG", (204, 204, 204)),
        (Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "TIFF", (255, 0, 0)),
        (Image.new("RGB", (1, 1), (1, 2, 3)), "PNG", (1, 2, 3)),
    ],
)
def test_modes(image, kind, colour):
    one_colour(saved(image, kind), colour)


def test_palette_with_a_transparent_colour_becomes_white():
    image = Image.new("P", (4, 4), 0)
    image.putpalette([10, 20, 30, 200, 100, 0])
    image.putpixel((0, 0), 1)
    data = saved(image, transparency=0)
    got = read_image(data)
    assert got[0, 0].tolist() == [200, 100, 0] and got[3, 3].tolist() == [255, 255, 255]


def test_rgb_with_a_transparent_colour_becomes_white():
    one_colour(saved(Image.new("RGB", (2, 2), (9, 9, 9)), transparency=(9, 9, 9)), (255, 255, 255))


def test_jpeg_in_cmyk():
    one_colour(saved(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG"), (254, 0, 0), tolerance=6)


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bits_of_grey_are_scaled_not_clipped(kind):
    values = np.array([[0, 257 * 10, 32896, 65535]], np.uint16)
    got = read_image(saved(Image.fromarray(values), kind))
    assert got[0, :, 0].tolist() == [0, 10, 128, 255]


def test_floats_are_scaled():
    got = read_image(saved(Image.fromarray(np.array([[0.0, 0.2, 1.0]], np.float32)), "TIFF"))
    assert got[0, :, 0].tolist() == [0, 51, 255]
    got = read_image(saved(Image.fromarray(np.array([[-100.0, 0.0, np.nan, 100.0]], np.float32)), "TIFF"))
    np.testing.assert_allclose(got[0, :, 0], [0, 127.5, 127.5, 255], atol=0.5)


def test_integers_are_scaled():
    got = read_image(saved(Image.fromarray(np.array([[0, 1_000_000]], np.int32)), "TIFF"))
    assert got[0, :, 0].tolist() == [0, 255]


def test_exif_orientation_is_applied():
    image = Image.new("RGB", (8, 4), "black")
    image.putpixel((0, 0), (255, 255, 255))
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees clockwise: the top left corner goes to the top right
    got = read_image(saved(image, "PNG", exif=exif))
    assert got.shape == (8, 4, 3) and got[0, 3].tolist() == [255, 255, 255]


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_the_first_frame_of_an_animation(kind):
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "blue")]
    options = {"lossless": True} if kind == "WEBP" else {}
    one_colour(saved(frames[0], kind, save_all=True, append_images=frames[1:], **options), (255, 0, 0), tolerance=1)


def test_refused(tmp_path, monkeypatch):
    good = saved(Image.fromarray(random_pixels(64, 64)))
    (tmp_path / "cut.png").write_bytes(good[: len(good) // 2])
    (tmp_path / "cut.jpg").write_bytes(saved(Image.fromarray(random_pixels(64, 64)), "JPEG")[:1500])
    (tmp_path / "text.jpg").write_text("hello")
    (tmp_path / "empty.png").touch()
    (tmp_path / "dir.png").mkdir()
    for name, cause in [
        ("cut.png", "damaged or cut short"),
        ("cut.jpg", "damaged or cut short"),
        ("text.jpg", "not a picture"),
        ("empty.png", "not a picture"),
        ("dir.png", "directory"),
        ("none.png", "no such file"),
        ("nul\0.png", "cannot be read"),
    ]:
        with pytest.raises(ImageError, match=cause) as error:
            read_image(tmp_path / name)
        assert name in str(error.value) and "\n" not in str(error.value)
    assert picture_size(tmp_path / "cut.png") == (64, 64)  # its header is good
    with pytest.raises(ImageError, match="bytes of memory"):
        read_image(b"nothing")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 4000)  # 64 x 64 is more, but not twice as much: Pillow only warns
    for look in (read_image, open_picture, picture_size):
        with pytest.raises(ImageError, match="4,000 pixels"):
            look(good)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 400)
    with pytest.raises(ImageError, match="400 pixels"):
        read_image(good)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_the_size_in_the_header_is_that_of_the_upright_picture(kind, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = saved(Image.fromarray(random_pixels(40, 20)), kind, exif=exif)
    size = read_image(data).shape[:2]
    assert size == ((20, 40) if orientation >= 5 else (40, 20))
    assert picture_size(data) == size
    with Image.open(io.BytesIO(data)) as image:
        assert picture_size(image) == size


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_a_size_is_known_without_the_pixels(kind):
    data = saved(Image.fromarray(random_pixels(64, 48)), kind)
    assert picture_size(data[: len(data) // 2]) == (64, 48)
    with pytest.raises(ImageError, match="damaged or cut short"):
        open_picture(data[: len(data) // 2])


def test_an_opened_picture_keeps_its_mode_and_stands_upright():
    image = Image.new("LA", (8, 4), (0, 128))
    image.putpixel((0, 0), (255, 255))
    exif = Image.Exif()
    exif[0x0112] = 6
    data = saved(image, exif=exif)
    for given in (data, Image.open(io.BytesIO(data))):
        got = open_picture(given)
        assert got.mode == "LA" and got.size == (4, 8) and got.getpixel((3, 0)) == (255, 255)


@pytest.mark.parametrize("look", [read_image, open_picture, picture_size])
def test_pixels_in_memory(look):
    pixels = random_pixels(5, 7)
    got = look(pixels)
    assert got == (5, 7) if look is picture_size else np.array_equal(np.asarray(got), pixels)
    for wrong in (pixels.astype(np.float32), pixels[..., 0], random_pixels(5, 7)[..., :2]):
        with pytest.raises(ImageError, match=r"expected \[height, width, 3\] uint8, found \[5, 7"):
            look(wrong)


def test_fit_stretch_pad_crop():
    image = np.zeros((20, 40, 3), np.uint8)
    image[:, 10:30] = 255
    assert fit_image(image, 16, "stretch").shape == (16, 16, 3)
    padded = fit_image(image, 16, "pad")
    assert (padded[:4] == PAD).all() and (padded[12:] == PAD).all() and padded[8, 8].tolist() == [255] * 3
    assert padded[8, 0].tolist() == [0] * 3
    cropped = fit_image(image, 16, "crop")
    assert (cropped[:, 1:-1] == 255).all() and (cropped > 240).all()  # bicubic reaches one pixel outside
    tall = fit_image(image.transpose(1, 0, 2), 16, "pad")
    assert (tall[:, :4] == PAD).all() and (tall[:, 12:] == PAD).all()
    assert fit_image(np.zeros((1, 1, 3), np.uint8), 16, "pad").shape == (16, 16, 3)
    exact = random_pixels(16, 16)
    for fit in ("stretch", "pad", "crop"):
        np.testing.assert_array_equal(fit_image(exact, 16, fit), exact)


@pytest.mark.parametrize("fit", ["pad", "crop"])
def test_a_picture_too_thin(fit):
    assert fit_image(np.zeros((1, 32, 3), np.uint8), 16, fit).shape == (16, 16, 3)
    with pytest.raises(ImageError, match="33x1 is too thin"):
        fit_image(np.zeros((1, 33, 3), np.uint8), 16, fit)
    with pytest.raises(ImageError, match="too thin"):
        fit_image(np.zeros((30000, 10, 3), np.uint8), 16, fit)
    assert fit_image(np.zeros((30000, 10, 3), np.uint8), 16, "stretch").shape == (16, 16, 3)
