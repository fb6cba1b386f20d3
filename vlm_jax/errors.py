"""What errors of other libraries say, for messages of ours."""

from __future__ import annotations


def first_line(error: Exception) -> str:
    """Its first line, or its kind where it says nothing."""
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
