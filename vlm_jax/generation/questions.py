"""A file of questions: a JSON object a line, pictures relative to the file.

    {"id": "7", "prompt": "what color is it?", "image": "a.png"}
    {"id": "8", "prompt": "<image> or <image>?", "images": ["a.png", "b.png"],
     "shots": [{"image": "c.png", "question": "what color is it?", "answer": "red"}]}

    {"id": "9", "messages": [{"role": "user", "content": [{"type": "image", "image": "a.png"}, {"type": "text", "text": "?"}]}]}

`shots` are solved examples shown before the question; `messages` is a chat (`processing/conversation.py`).
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from vlm_jax.errors import RequestError, check_text
from vlm_jax.files import JsonError, parse_json, read_regular
from vlm_jax.generation.request import Request, chat_request
from vlm_jax.processing.conversation import Shot, from_prompt
from vlm_jax.processing.pictures import ImageError, picture_size


@dataclasses.dataclass(frozen=True, slots=True)
class Question:
    line: int  # of the input, counted from 1
    id: Any
    prompt: str
    request: Request  # its seed is the number of the line


@dataclasses.dataclass(frozen=True)
class Questions:
    """A file of questions."""

    path: Path
    asked: list[Question]
    refused: dict[int, str]  # line -> what is wrong with it


def read_questions(path: Path) -> Questions:
    """All questions of a file; empty lines are passed over, and wrong ones told apart.

    Raises:
      RequestError: the file cannot be read, or none of its lines can be asked; the message says what is wrong with the first.
    """
    try:
        lines = read_regular(path).split(b"\n")  # and not at other line ends, which may stand in JSON strings
    except OSError as error:
        raise RequestError(f"--input={path}: {error.strerror}") from error
    asked, refused = [], {}
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                asked.append(_question(path, number, line))
            except RequestError as error:
                refused[number] = str(error)
    if not asked:
        raise RequestError(next(iter(refused.values()), f"--input={path}: holds no questions"))
    return Questions(path, asked, refused)


def _question(path: Path, number: int, line: bytes) -> Question:
    where = f"{path}:{number}"
    try:
        entry = parse_json(line)
        check_text("the line", json.dumps(entry, ensure_ascii=False))
    except (JsonError, RequestError) as error:
        raise RequestError(f"{where}: {error}") from None
    if isinstance(entry, dict) and "messages" in entry:
        _check(where, entry, {"id", "messages"}, {"messages"})
        try:
            request = chat_request(entry["messages"], path.parent, seed=number)
        except RequestError as error:
            raise RequestError(f"{where}: {error}") from None
        _check_files(where, request)
        return Question(number, entry.get("id", number), request.turns[-1].text, request)
    _check(where, entry, {"id", "prompt", "image", "images", "shots"}, {"prompt"})
    shots = []
    for place, shot in enumerate(_take(where, entry, "shots", list, []), 1):
        name = f"{where}: shot {place}"
        _check(name, shot, {"image", "images", "question", "answer"}, {"question", "answer"})
        texts = (_take(name, shot, key, str, "") for key in ("question", "answer"))
        shots.append(Shot(_images(name, path, shot), *texts))
    prompt = _take(where, entry, "prompt", str, "")
    try:
        request = Request(*from_prompt(prompt, _images(where, path, entry), shots), seed=number)
    except RequestError as error:
        raise RequestError(f"{where}: {error}") from None
    _check_files(where, request)
    return Question(number, entry.get("id", number), prompt, request)


def _check(where: str, entry: Any, known: set[str], needed: set[str]) -> None:
    if not isinstance(entry, dict):
        raise RequestError(f"{where}: expected an object with {sorted(known)}, found {type(entry).__name__}")
    if not needed <= entry.keys():
        raise RequestError(f"{where}: {min(needed - entry.keys())!r} is missing")
    if entry.keys() - known:
        raise RequestError(f"{where}: unknown key {min(entry.keys() - known)!r}; expected {sorted(known)}")


def _take(where: str, entry: dict[str, Any], key: str, kind: type, default: Any) -> Any:
    value = entry.get(key, default)
    if not isinstance(value, kind):
        raise RequestError(f"{where}: {key!r} is {json.dumps(value)[:60]}; expected a {kind.__name__}")
    return value


def _images(where: str, path: Path, entry: dict[str, Any]) -> tuple[str, ...]:
    if "image" in entry and "images" in entry:
        raise RequestError(f"{where}: has 'image' and 'images'; expected one of them")
    names = [_take(where, entry, "image", str, "")] if "image" in entry else _take(where, entry, "images", list, [])
    files = []
    for name in names:
        if not isinstance(name, str):
            raise RequestError(f"{where}: {json.dumps(name)[:60]} among 'images'; expected paths")
        files.append(str(path.parent / name))
    return tuple(files)


def _check_files(where: str, request: Request) -> None:
    for picture in (picture for medium in request.media for picture in medium):
        try:
            picture_size(picture)
        except ImageError as error:
            raise RequestError(f"{where}: {error}") from None
