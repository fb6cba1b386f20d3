"""A record of a JSON-lines file -> Example. The two formats are described in `jsonl.py`."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

from vlm_jax.data.example import Example, ImageAt, Text

MARKER = "<image>"
HUMAN, GPT = ("human", "user"), ("gpt", "assistant")


class Bad(Exception):
    """What is wrong with a record; the caller adds the line."""


def shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."


def _take(record: dict, key: str, kind: type, default: Any = ...) -> Any:
    value = record.get(key, default)
    if value is ...:
        raise Bad(f"has no {key!r}")
    if value is not default and not isinstance(value, kind):
        names = {str: "a string", list: "a list", bool: "true or false"}
        raise Bad(f"{key!r} is {shown(value)}; expected {names[kind]}")
    if kind is str and any("\ud800" <= letter <= "\udfff" for letter in value):
        raise Bad(f"{key!r} has half of a surrogate pair, which is no character")
    return value


class Record:
    """One parsed JSON value on its way to an Example."""

    def __init__(self, where: str, record: Any, picture: Callable[[Any], str]):
        if not isinstance(record, dict):
            raise Bad(f"is {shown(record)}; expected an object")
        self._where, self._record, self._picture = where, record, picture
        self._images: list[tuple[str, ...]] = []

    def example(self, prompt: str, answer: str) -> Example:
        """Raises Bad."""
        kinds = [key for key in ("conversations", "content") if key in self._record]
        if len(kinds) != 1:
            raise Bad(f"has the keys {sorted(self._record)}; expected 'conversations' or 'content', one of them")
        parts = self._conversation(prompt, answer) if kinds[0] == "conversations" else self._interleaved()
        if not any(isinstance(part, Text) and part.learn for part in parts):
            raise Bad('has nothing to learn: no text of gpt, or no text with "learn": true')
        return Example(self._where, tuple(self._images), (tuple(parts),))

    def _next_image(self, paths: Any) -> ImageAt:
        self._images.append(tuple(self._picture(path) for path in paths))
        return ImageAt(len(self._images) - 1)

    def _conversation(self, prompt: str, answer: str) -> list[Text | ImageAt]:
        turns = _take(self._record, "conversations", list)
        found = self._record.get("image")
        paths = [] if found is None else found if isinstance(found, list) else [found]
        said: list[str] = []
        for number, turn in enumerate(turns):
            if not isinstance(turn, dict):
                raise Bad(f"turn {number + 1} is {shown(turn)}; expected an object of 'from' and 'value'")
            speaker = _take(turn, "from", str)
            expected = GPT if number % 2 else HUMAN
            if speaker not in expected:
                raise Bad(f"turn {number + 1} is from {speaker!r}; expected {expected[0]!r}: they take turns, human first")
            said.append(_take(turn, "value", str))
        markers = sum(value.count(MARKER) for value in said[::2])
        if any(MARKER in value for value in said[1::2]):
            raise Bad(f"{MARKER} in a turn of gpt; pictures belong to human turns")
        if said and not markers:
            said[0] = MARKER * len(paths) + said[0]
        elif markers != len(paths):
            raise Bad(f"{markers} times {MARKER} and {len(paths)} pictures; expected equally many")
        images = iter(paths)
        parts: list[Text | ImageAt] = []
        for number, value in enumerate(said):
            if number % 2:
                parts.append(Text(answer.replace("{answer}", value.strip()), learn=True))
                continue
            leading, pieces = split_markers(value)
            before, after = prompt.split("{question}")
            pieces = [before + pieces[0], *pieces[1:]]
            pieces[-1] += after
            parts += [self._next_image([next(images)]) for _ in range(leading)]
            parts += [Text(pieces[0], learn=False)]
            for piece in pieces[1:]:
                parts += [self._next_image([next(images)]), Text(piece, learn=False)]
        return [part for part in parts if isinstance(part, ImageAt) or part.text or part.learn]

    def _interleaved(self) -> list[Text | ImageAt]:
        parts: list[Text | ImageAt] = []
        for number, part in enumerate(_take(self._record, "content", list), 1):
            if not isinstance(part, dict):
                raise Bad(f"part {number} is {shown(part)}; expected an object")
            kinds = [key for key in ("text", "image", "frames") if key in part]
            unknown = set(part) - {"text", "image", "frames", "learn"}
            if unknown:
                raise Bad(f"part {number} has the unknown key {min(unknown)!r}; expected 'text', 'image', 'frames' or 'learn'")
            if len(kinds) != 1 or ("learn" in part and kinds != ["text"]):
                raise Bad(f"part {number} is {shown(part)}; expected 'text' (and 'learn'), or 'image', or 'frames'")
            if "text" in part:
                parts.append(Text(_take(part, "text", str), _take(part, "learn", bool, True)))
            elif "image" in part:
                parts.append(self._next_image([part["image"]]))
            else:
                frames = _take(part, "frames", list)
                if not frames:
                    raise Bad(f"part {number}: 'frames' is empty")
                parts.append(self._next_image(frames))
        return parts


def split_markers(value: str) -> tuple[int, list[str]]:
    """A human turn -> how many images stand before it, and the text around those that stand within."""
    if value.count(MARKER) == 1:  # LLaVA's data has it before or behind the question, and means the same
        return 1, [re.sub(rf"\s*{MARKER}\s*", " ", value).strip()]
    leading = re.match(rf"(\s*{MARKER})*", value)
    rest = value[leading.end() :]
    return leading.group().count(MARKER), rest.strip().split(MARKER)
