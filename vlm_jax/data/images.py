"""Pictures: files of any kind -> [H, W, 3] uint8, fitted to the model's square, augmented.

Axis letters: H x W pixels, S the side of the model's square.
"""

from __future__ import annotations

import io
import warnings
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image, ImageOps

from vlm_jax.config import AugmentConfig

PAD = (122, 116, 104)  # CLIP's mean colour
GREY = 128  # of a blanked picture


class ImageError(ValueError):
    """A picture that cannot be used; the message names the file and the cause."""


def _name(source: str | Path | bytes) -> str:
    return f"<{len(source)} bytes of memory>" if isinstance(source, bytes) else str(source)


def _refuse(source: str | Path | bytes, cause: str) -> ImageError:
    return ImageError(f"picture {_name(source)}: {cause}")


def _open(source: str | Path | bytes) -> Image.Image:
    """Opens the file and reads its header.

    Raises:
      ImageError: see `read_image`.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            return Image.open(io.BytesIO(source) if isinstance(source, bytes) else source)
    except FileNotFoundError:
        raise _refuse(source, "there is no such file") from None
    except IsADirectoryError:
        raise _refuse(source, "is a directory, not a picture") from None
    except PermissionError:
        raise _refuse(source, "may not be read (file permissions)") from None
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        limit = Image.MAX_IMAGE_PIXELS
        raise _refuse(source, f"more than {limit:,} pixels (PIL.Image.MAX_IMAGE_PIXELS); make it smaller") from None
    except Image.UnidentifiedImageError:
        raise _refuse(source, "is not a picture, or of a kind Pillow does not know") from None
    except Exception as error:  # Pillow's parsers raise many kinds on damaged files, SyntaxError and struct.error among them
        raise _refuse(source, f"cannot be read: {error}") from error


def check_image(source: str | Path | bytes) -> None:
    """Whether the file is there and its header is a picture's; the pixels are not decoded.

    Raises:
      ImageError: see `read_image`.
    """
    _open(source).close()


def read_image(source: str | Path | bytes, on_white: bool = True) -> np.ndarray:
    """Decodes a picture as RGB: the first frame of an animation, EXIF orientation applied.

    Grey pictures of more than 8 bits are scaled, not clipped: 16-bit integers from 0..65535, other integers and floats
    from the least to the greatest value they contain (floats within 0..1 from 0..1).

    Args:
      source: a path, or the bytes of a file.
      on_white: lay what is transparent on white; else transparency is dropped, as transformers' processors do.

    Returns:
      [H, W, 3] uint8.

    Raises:
      ImageError: missing, unreadable, truncated, not a picture, or larger than Pillow's limit against decompression bombs.
    """
    image = _open(source)
    with image:
        try:
            image.seek(0)
            image.load()
            return np.array(_to_rgb(ImageOps.exif_transpose(image), on_white))
        except Exception as error:  # as in `_open`
            raise _refuse(source, f"is damaged or cut short: {error}") from error


def _to_rgb(image: Image.Image, on_white: bool) -> Image.Image:
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        return Image.fromarray(_scale_grey(np.asarray(image), image.mode)).convert("RGB")
    if on_white and (image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info):
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def _scale_grey(values: np.ndarray, mode: str) -> np.ndarray:
    """[H, W] of any number -> [H, W] uint8."""
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
      image: [H, W, 3] uint8.
      size: S.

    Returns:
      [S, S, 3] uint8.

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


def augment(image: np.ndarray, config: AugmentConfig, rng: np.random.Generator) -> np.ndarray:
    """Flips, shifts and recolours at random, as far as `config` says.

    Args:
      image: [S, S, C] uint8; C is 3, or 3 F for F frames to be changed alike.

    Returns:
      [S, S, C] uint8; a new array unless nothing was done.
    """
    if config.flip or config.shift:
        height, width = image.shape[:2]
        up_down, left_right = rng.integers(0, 2, size=2) * config.flip
        down, right = rng.integers(-config.shift, config.shift + 1, size=2)
        # The border is repeated: places behind it read it again.
        rows = np.minimum(np.maximum(np.arange(height) - down, 0), height - 1)
        columns = np.minimum(np.maximum(np.arange(width) - right, 0), width - 1)
        image = image.take(rows[:: -1 if up_down else 1], axis=0).take(columns[:: -1 if left_right else 1], axis=1)
    if config.colour:
        brightness, contrast = rng.uniform(-config.colour, config.colour, size=2)
        mean = image.mean()
        # One table of 256 values is cheaper than arithmetic on every pixel.
        table = (np.arange(256) - mean) * (1 + contrast) + mean * (1 + brightness)
        image = np.round(table).clip(0, 255).astype(np.uint8)[image]
    return image


def blank_image(size: int) -> np.ndarray:
    """What every picture becomes in the control experiment: [S, S, 3] uint8, mid-grey."""
    return np.full((size, size, 3), GREY, np.uint8)
