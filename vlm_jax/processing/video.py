"""Videos by their files: frames sampled at a rate, each a picture like any other, decoded when its pixels are read.

PyAV reads them (`pip install 'vlm_jax[video]'`); an animated GIF is read by Pillow. What is sampled is known from the file's
header, so that a data set is tokenised without decoding its videos. Decoding is where pixels are made, in the data workers.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vlm_jax.errors import FileUnavailable, ImageError, RequestError, first_line

RATE, MOST = 1.0, 8  # frames a second and of a video, where nothing else is said (Flamingo, Alayrac et al. 2022)
PROBED, DECODED = 1024, 2  # videos of which the header, and the frames, are remembered
EARLY = 1e-3  # seconds that a frame may begin after its time

Stamp = tuple[int, int]  # bytes and time of a file, so that one that was changed is read again


@dataclasses.dataclass(frozen=True, slots=True)
class VideoFrame:
    """One of the frames that are sampled of a video."""

    path: str
    times: tuple[float, ...]  # seconds, of all that are sampled; they are decoded together
    number: int  # which of them it is

    def __str__(self) -> str:
        return f"{self.path} at {self.times[self.number]:.2f} s"

    @property
    def size(self) -> tuple[int, int]:
        """Height and width, upright.

        Raises:
          ImageError: as `sampled_frames`.
        """
        return _probed(self.path, _stamp(self.path)).size

    def decoded(self) -> Image.Image:
        """
        Raises:
          ImageError: as `sampled_frames`, or the video cannot be decoded.
        """
        return Image.fromarray(_decoded(self.path, _stamp(self.path), self.times)[self.number])


def sampled_frames(path: str | Path, *, rate: float = RATE, most: int = MOST) -> tuple[VideoFrame, ...]:
    """The frames that are read of a video: one at its beginning, and so many a second; where that would be too many, `most` in
    equal distances.

    Args:
      rate: frames a second.
      most: F.

    Raises:
      ImageError: no such file, no video, or PyAV is not installed; RequestError: `most` leaves no room for a video.
    """
    path = str(path)
    if most < 2:
        raise RequestError(f"video {path}: a slot has one frame: set data.frames to as many as are read of a video")
    seconds = _probed(path, _stamp(path)).seconds
    count = max(1, math.ceil(seconds * rate - EARLY))
    times = [number / rate for number in range(count)]
    if count > most:
        times = [seconds * (number + 0.5) / most for number in range(most)]
    return tuple(VideoFrame(path, tuple(times), number) for number in range(len(times)))


@dataclasses.dataclass(frozen=True)
class _Header:
    size: tuple[int, int]
    seconds: float


def _stamp(path: str) -> Stamp:
    try:
        found = os.stat(path)
    except (OSError, ValueError) as error:
        cause = "there is no such file" if isinstance(error, FileNotFoundError) else getattr(error, "strerror", str(error))
        raise FileUnavailable(f"video {path}: {cause}") from None
    return found.st_size, found.st_mtime_ns


def _frames(path: str) -> Iterator[tuple[float, Any]]:
    """(second at which it begins, what makes it [height, width, 3] uint8) of each frame, in order, and at last (end, None)."""
    if path.lower().endswith(".gif"):
        yield from _gif_frames(path)
        return
    av = _av(path)
    end = 0.0
    with av.open(path) as container:
        if not container.streams.video:
            raise ImageError(f"video {path}: has no pictures in it, only sound or text")
        stream = container.streams.video[0]
        stream.thread_type = "AUTO"
        first = None
        for frame in container.decode(stream):
            begin = frame.time if frame.time is not None else end
            first = begin if first is None else first
            end = begin - first + float(1 / (stream.average_rate or 25))
            yield begin - first, functools.partial(_upright, frame)
    yield end, None


def _av(path: str) -> Any:
    try:
        import av
    except ImportError as error:
        raise ImageError(
            f"video {path}: needs PyAV: pip install 'vlm_jax[video]'; without it animated GIFs are read, and lists of frames"
        ) from error
    av.logging.set_level(None)
    return av


def _upright(frame: Any) -> np.ndarray:
    turns = round(getattr(frame, "rotation", 0) / 90) % 4
    return np.ascontiguousarray(np.rot90(frame.to_ndarray(format="rgb24"), turns))


def _gif_frames(path: str) -> Iterator[tuple[float, Any]]:
    end = 0.0
    with Image.open(path) as image:
        for number in range(getattr(image, "n_frames", 1)):
            image.seek(number)
            yield end, functools.partial(np.asarray, image.convert("RGB"))  # a copy: the frames share one image
            end += (image.info.get("duration") or 100) / 1000  # browsers show frames without a duration so long
    yield end, None


@functools.lru_cache(PROBED)
def _probed(path: str, stamp: Stamp) -> _Header:
    """Its first frame, and its length by the header; where that does not say it, all frames are counted."""
    with _named_errors(path):
        frames = _frames(path)
        _, made = next(frames)
        if made is None:
            raise ImageError(f"video {path}: has no frame")
        height, width = made().shape[:2]
        seconds = _header_seconds(path)
        if seconds is None:
            seconds = [begin for begin, _ in frames][-1]
    return _Header((height, width), seconds)


def _header_seconds(path: str) -> float | None:
    if path.lower().endswith(".gif"):
        return None
    av = _av(path)
    with av.open(path) as container:
        stream = container.streams.video[0]
        if stream.duration is not None and stream.time_base is not None:
            return float(stream.duration * stream.time_base)
        return None if container.duration is None else container.duration / av.time_base


@functools.lru_cache(DECODED)
def _decoded(path: str, stamp: Stamp, times: tuple[float, ...]) -> list[np.ndarray]:
    """[height, width, 3] uint8, of each time the frame that is shown then."""
    found: list[np.ndarray] = []
    with _named_errors(path):
        latest = None
        for begin, made in _frames(path):
            # The frame before is shown until this one begins.
            while latest is not None and len(found) < len(times) and (made is None or begin > times[len(found)] + EARLY):
                found.append(latest())
            if len(found) == len(times):
                return found
            latest = made
    return found


@contextlib.contextmanager
def _named_errors(path: str) -> Iterator[None]:
    """Whatever Pillow's and FFmpeg's parsers raise, as ImageError with the file's name."""
    try:
        yield
    except ImageError:
        raise
    except Exception as error:
        raise ImageError(f"video {path}: cannot be read as a video, or is damaged: {first_line(error)}") from error
