"""Errors for users: one line that says what to change."""

from __future__ import annotations

import json
from typing import Any

MAX_SHOWN = 60  # characters of a wrong value


class RequestError(ValueError):
    """A question or conversation the model cannot answer or read; the message says what to change."""


class DataError(ValueError):
    """Something is wrong with the user's data; the message names the file and the line."""


class ImageError(ValueError):
    """A picture that cannot be used; the message names the file and the cause."""


class FileUnavailable(ImageError):
    """The picture's file cannot be opened or read: nothing is known of the picture itself."""


class RecordError(Exception):
    """What is wrong with a record of a data set; the caller adds where it stands."""


def as_json(value: Any) -> str:
    """A wrong value, for messages."""
    return abbreviated(json.dumps(value, ensure_ascii=False, default=str))


def first_line(error: BaseException) -> str:
    """The first line of an error's text, or its kind where it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def abbreviated(text: str) -> str:
    """The text, or its beginning if it is long."""
    return text if len(text) <= MAX_SHOWN else text[: MAX_SHOWN - 3] + "..."


def check_text(name: str, text: str) -> None:
    """
    Raises:
      RequestError: half of a surrogate pair, as bytes that are not UTF-8 leave it; no tokenizer reads it.
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        raise RequestError(f"{name} has half of a surrogate pair, or bytes that are not UTF-8: {abbreviated(text)!a}") from None


def counted(number: int, name: str) -> str:
    """1, "tile" -> "1 tile"; 2, "tile" -> "2 tiles"."""
    return f"{number} {name}{'' if number == 1 else 's'}"
