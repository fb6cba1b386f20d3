"""Pictures: files, bytes, PIL images and arrays -> sizes from their headers, upright PIL images, [height, width, 3] uint8."""

from __future__ import annotations

import contextlib
import io
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, Literal

import numpy as np
from PIL import Image, ImageOps

from vlm_jax.errors import FileUnavailable, ImageError
from vlm_jax.files import NotRegular, open_regular
from vlm_jax.processing.video import VideoFrame

PAD = (122, 116, 104)  # CLIP's mean colour
GREY = 128  # of a blanked picture


# A file, its bytes, pixels [height, width, 3] uint8, or a frame of a video.
Picture = str | Path | bytes | np.ndarray | Image.Image | VideoFrame
Size = tuple[int, int]  # height, width in pixels

ORIENTATION = 274  # the EXIF tag
TURNED = (5, 6, 7, 8)  # its values that exchange height and width


def picture_name(picture: Picture) -> str:
    """Its name in messages."""
    if isinstance(picture, bytes):
        return f"<{len(picture)} bytes of memory>"
    return str(picture) if isinstance(picture, str | Path | VideoFrame) else "<pixels>"


def _refuse(source: Picture, cause: str, kind: type[ImageError] = ImageError) -> ImageError:
    return kind(f"picture {picture_name(source)}: {cause}")


@contextlib.contextmanager
def _opened(source: str | Path | bytes) -> Iterator[Image.Image]:
    """The picture with its header read.

    Raises:
      ImageError: see `open_picture`.
    """
    try:
        file = io.BytesIO(source) if isinstance(source, bytes) else open_regular(source)
    except (OSError, ValueError) as error:
        raise _unavailable(source, error) from None
    with file, _header(source, file) as image:
        yield image


def _unavailable(source: Picture, error: OSError | ValueError) -> ImageError:
    """What the system said of its file; ValueError: a name that no file can have."""
    match error:
        case FileNotFoundError():
            cause = "there is no such file"
        case IsADirectoryError():
            cause = "is a directory, not a picture"
        case PermissionError():
            cause = "may not be read (file permissions)"
        case NotRegular():
            cause = error.strerror
        case _:
            cause = f"cannot be read: {getattr(error, 'strerror', None) or error}"
    return _refuse(source, cause, FileUnavailable)


def _header(source: Picture, file: BinaryIO) -> Image.Image:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            return Image.open(file)
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        limit = Image.MAX_IMAGE_PIXELS
        raise _refuse(source, f"more than {limit:,} pixels (PIL.Image.MAX_IMAGE_PIXELS); make it smaller") from None
    except Image.UnidentifiedImageError:
        raise _refuse(source, "is not a picture, or of a kind Pillow does not know") from None
    except Exception as error:  # Pillow's parsers raise many kinds on damaged files, SyntaxError and struct.error among them
        raise _refuse(source, f"cannot be read: {error}") from error


def picture_size(picture: Picture) -> Size:
    """Height and width of the upright picture, from the file's header: the pixels are not decoded.

    Raises:
      ImageError: see `open_picture`.
    """
    if isinstance(picture, np.ndarray):
        return _checked(picture).shape[:2]
    if isinstance(picture, Image.Image):
        return _upright_size(picture)
    if isinstance(picture, VideoFrame):
        return picture.size
    with _opened(picture) as image:
        return _upright_size(image)


def file_bytes(picture: Picture) -> int:
    """The bytes of a picture's file; 0: it is none.

    Raises:
      FileUnavailable: there is no such file, or nothing can be known of it.
    """
    if isinstance(picture, str | Path | VideoFrame):
        try:
            return os.stat(picture.path if isinstance(picture, VideoFrame) else picture).st_size
        except (OSError, ValueError) as error:
            raise _unavailable(picture, error) from None
    return len(picture) if isinstance(picture, bytes) else 0


def _upright_size(image: Image.Image) -> Size:
    # Pillow decodes a whole PNG to look for EXIF data behind its pixels, so only what stands before them is asked for.
    known = image.format != "PNG" or {"exif", "Raw profile type exif", "XML:com.adobe.xmp"} & image.info.keys()
    turned = known and image.getexif().get(ORIENTATION) in TURNED
    return (image.width, image.height) if turned else (image.height, image.width)


def open_picture(picture: Picture) -> Image.Image:
    """A picture decoded, upright (EXIF orientation applied), in its own mode; the first frame of an animation.

    Raises:
      ImageError: missing, unreadable, truncated, not a picture, larger than Pillow's limit against decompression bombs, or an
        array of another shape or type than [height, width, 3] uint8.
    """
    if isinstance(picture, np.ndarray):
        return Image.fromarray(_checked(picture))
    try:
        if isinstance(picture, Image.Image):
            return ImageOps.exif_transpose(picture)
        if isinstance(picture, VideoFrame):
            return picture.decoded()
        with _opened(picture) as image:
            image.seek(0)
            image.load()
            return ImageOps.exif_transpose(image)
    except ImageError:
        raise
    except Exception as error:  # as in `_header`
        if isinstance(error, OSError) and error.errno:  # of the file, not of what it holds
            raise _unavailable(picture, error) from error
        raise _refuse(picture, f"is damaged or cut short: {error}") from error


def _checked(array: np.ndarray) -> np.ndarray:
    if array.ndim != 3 or array.shape[2] != 3 or array.dtype != np.uint8:
        raise ImageError(f"picture <pixels>: expected [height, width, 3] uint8, found {list(array.shape)} {array.dtype}")
    return array


def read_image(picture: Picture) -> np.ndarray:
    """Decodes a picture as RGB, as the models trained here read it: what is transparent is laid on white.

    Grey pictures of more than 8 bits are scaled, not clipped: 16-bit integers from 0..65535, other integers and floats
    from the least to the greatest value they contain (floats within 0..1 from 0..1).

    Returns:
      [height, width, 3] uint8.

    Raises:
      ImageError: see `open_picture`.
    """
    if isinstance(picture, np.ndarray):
        return _checked(picture)
    try:
        return np.array(_to_rgb(open_picture(picture)))
    except ImageError:
        raise
    except Exception as error:  # a conversion of pixels that Pillow lacks
        raise _refuse(picture, f"cannot be read as RGB: {error}") from error


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        return Image.fromarray(_scale_grey(np.asarray(image), image.mode)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def _scale_grey(values: np.ndarray, mode: str) -> np.ndarray:
    """[height, width] of any number -> [height, width] uint8."""
    values = np.nan_to_num(values.astype(np.float64), nan=0.0, posinf=0.0, neginf=0.0)
    low, high = float(values.min()), float(values.max())
    if mode.startswith("I;16") or (mode == "I" and low >= 0 and 255 < high <= 65535):
        low, high = 0.0, 65535.0
    elif mode == "I" and low >= 0 and high <= 255:
        low, high = 0.0, 255.0
    elif mode == "F" and low >= 0 and high <= 1:
        low, high = 0.0, 1.0
    return np.round((values - low) * (255.0 / max(high - low, 1e-30))).clip(0, 255).astype(np.uint8)


def fit_image(image: np.ndarray, size: int, fit: Literal["stretch", "pad", "crop"]) -> np.ndarray:
    """Resizes (bicubic) a picture to the model's square.

    stretch: both sides become `size`. pad: the longer does, and CLIP's mean colour fills up around it. crop: the shorter
    does, and the middle is kept.

    Args:
      image: [height, width, 3] uint8.
      size: S.

    Returns:
      [side, side, 3] uint8.

    Raises:
      ImageError: with "pad", less than half a pixel of the shorter side would be left; with "crop", less than half a pixel
        of the longer side would be kept.
    """
    height, width = image.shape[:2]
    long, short = max(height, width), min(height, width)
    if fit != "stretch" and long > 2 * size * short:
        raise ImageError(
            f"a picture of {width}x{height} is too thin for image_fit={fit!r} at {size} pixels: at most {2 * size} times as "
            "long as it is wide. Cut it, leave it out, or use 'stretch'"
        )
    if height == width == size:
        return image
    if fit == "stretch":
        return _resize(image, size, size)
    if fit == "pad":
        inner = _resize(image, max(1, round(height * size / long)), max(1, round(width * size / long)))
        top, left = (size - inner.shape[0]) // 2, (size - inner.shape[1]) // 2
        square = np.empty((size, size, 3), np.uint8)
        square[:] = PAD
        square[top : top + inner.shape[0], left : left + inner.shape[1]] = inner
        return square
    # The middle square is cut before it is resized: of a long strip only what is kept is computed.
    top, left = (height - short) / 2, (width - short) / 2
    return _resize(image, size, size, box=(left, top, left + short, top + short))


def _resize(image: np.ndarray, height: int, width: int, box: tuple[float, ...] | None = None) -> np.ndarray:
    if image.shape[:2] == (height, width) and box is None:
        return image
    return np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC, box=box))


def blank_image(size: int) -> np.ndarray:
    """The image of the control experiment: [side, side, 3] uint8, mid-grey."""
    return np.full((size, size, 3), GREY, np.uint8)
