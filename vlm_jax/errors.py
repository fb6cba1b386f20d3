"""Errors for users: one line that says what to change."""

from __future__ import annotations


class RequestError(ValueError):
    """A question or conversation the model cannot answer or read; the message says what to change."""


class DataError(ValueError):
    """Something is wrong with the user's data; the message names the file and the line."""


def first_line(error: BaseException) -> str:
    """The first line of an error's text, or its kind where it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
