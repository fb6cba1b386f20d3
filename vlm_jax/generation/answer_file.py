"""A file of questions -> a file of answers: in batches, and resumable.

A line of the input, pictures relative to the file; `shots` are solved examples shown before the question::

    {"id": "7", "prompt": "what color is it?", "image": "a.png"}
    {"id": "8", "prompt": "<image> or <image>?", "images": ["a.png", "b.png"],
     "shots": [{"image": "c.png", "question": "what color is it?", "answer": "red"}]}

    {"id": "9", "messages": [{"role": "user", "content": [{"type": "image", "image": "a.png"}, {"type": "text", "text": "?"}]}]}

A line of the output, in the order the answers come::

    {"line": 1, "id": "7", "prompt": "what color is it?", "answer": "blue"}
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vlm_jax.config.generation import Settings
from vlm_jax.errors import RequestError
from vlm_jax.generation.generator import Prompt
from vlm_jax.generation.request import Request, chat_request
from vlm_jax.processing.conversation import Shot, from_prompt
from vlm_jax.processing.pictures import ImageError
from vlm_jax.progress import human_time

WINDOW = 16  # batches whose questions are sorted by length together


@dataclasses.dataclass(frozen=True, slots=True)
class Question:
    line: int  # of the input, counted from 1
    id: Any
    prompt: str
    request: Request  # its seed is the number of the line


def read_questions(path: Path) -> list[Question]:
    """All questions of a file; empty lines are passed over.

    Raises:
      RequestError: what is wrong with which line.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise RequestError(f"--input={path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise RequestError(f"--input={path}: not UTF-8 text ({error.reason} at byte {error.start})") from error
    questions = [_question(path, number, line) for number, line in enumerate(lines, 1) if line.strip()]
    if not questions:
        raise RequestError(f"--input={path}: holds no questions")
    return questions


def _question(path: Path, number: int, line: str) -> Question:
    where = f"{path}:{number}"
    try:
        entry = json.loads(line)
    except json.JSONDecodeError as error:
        raise RequestError(f"{where}: not JSON: {error.msg} at column {error.colno}") from None
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
        if not Path(picture).is_file():
            raise RequestError(f"{where}: picture {picture}: there is no such file")


def answered(output: Path, questions: list[Question]) -> set[int]:
    """The input lines that the output answers already. A last line that was cut short is removed.

    Raises:
      RequestError: the output is not of this input, and is left as it is.
    """
    if not output.exists():
        return set()
    by_line = {question.line: question for question in questions}
    whole, newline, rest = output.read_bytes().rpartition(b"\n")
    found = set()
    for number, line in enumerate(whole.splitlines(), 1):
        where = f"--output={output}: line {number}"
        try:
            entry = json.loads(line)
            same = by_line[entry["line"]]
            same = (entry["id"], entry["prompt"]) == (same.id, same.prompt)
        except (ValueError, KeyError, TypeError):
            same = False
        if not same:
            raise RequestError(f"{where} is not an answer to a line of the input: give another --output, or remove the file")
        found.add(entry["line"])
    if rest:
        with output.open("r+b") as file:
            file.truncate(len(whole) + len(newline))
    return found


def answer_file(
    vlm: Any, source: Path, questions: list[Question], output: Path, settings: Settings, progress: Callable[[str], None]
) -> int:
    """Answers what is not answered yet, each answer on disk as soon as it is there. Returns how many were answered.

    The samples of a line depend on the seed and its number alone, so that a resumed run gives what an undisturbed one does.

    Args:
      vlm: of `api.load`.
      progress: gets a line of progress now and then.

    Raises:
      RequestError: a question that does not fit the model, or a wrong output; ImageError: a picture that cannot be read. What
        was answered before is kept.
    """
    done = answered(output, questions)
    left = [question for question in questions if question.line not in done]
    if done:
        progress(f"{len(done)} of {len(questions)} were answered already")
    began, count, window = time.perf_counter(), 0, WINDOW * vlm.generator.rows
    try:
        file = output.open("a", encoding="utf-8")
    except OSError as error:
        raise RequestError(f"--output={output}: {error.strerror}") from error
    with file:
        for start in range(0, len(left), window):
            prompts = [_prompt(vlm, source, question, settings) for question in left[start : start + window]]
            for batch in vlm.generator.batches(prompts, settings):
                for index, answer in batch.items():
                    question = left[start + index]
                    entry = {"line": question.line, "id": question.id, "prompt": question.prompt, "answer": answer.text}
                    file.write(json.dumps(entry, ensure_ascii=False) + "\n")
                file.flush()
                count += len(batch)
                rate = count / (time.perf_counter() - began)
                progress(
                    f"{len(done) + count}/{len(questions)}  {rate:.3g} answers/s  left {human_time((len(left) - count) / rate)}"
                )
    return count


def _prompt(vlm: Any, source: Path, question: Question, settings: Settings) -> Prompt:
    try:
        return vlm.generator.prompt(question.request, question.line, settings)
    except (RequestError, ImageError) as error:
        raise RequestError(f"{source}:{question.line}: {error}") from None
