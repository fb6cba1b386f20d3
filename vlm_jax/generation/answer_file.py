"""A file of answers: in batches, and resumable. A line of it, in the order the answers come::

    {"line": 1, "id": "7", "prompt": "what color is it?", "answer": "blue", "asked": "5b3c..."}

`asked` is a hash of the whole question, the pictures' bytes included: one that was changed is asked again.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from vlm_jax.config.generation import Settings
from vlm_jax.errors import RequestError, counted
from vlm_jax.files import JsonError, lock, open_regular, parse_json, sha256
from vlm_jax.generation.questions import Question, Questions
from vlm_jax.generation.request import Request
from vlm_jax.processing.pictures import ImageError, Picture
from vlm_jax.progress import human_time

START = b'{"line": '  # of a line
WINDOW = 16  # batches whose questions are sorted by length together


class _Answers:
    """The file of answers, which no other process can write meanwhile."""

    def __init__(self, path: Path, questions: Questions) -> None:
        """
        Raises:
          RequestError: it is not of this input, is left as it is; or another process writes it.
        """
        self.path = path
        self._sha256 = functools.lru_cache(4096)(sha256)
        with self._named():
            self._file = _locked(path, "ab")
        try:
            found = self._found(questions)
        except BaseException:
            self._file.close()
            raise
        self.done = {number for number, (_, same) in found.items() if same}
        self.stale = len(found) - len(self.done)
        if self.stale:
            with self._named():
                self._keep([line for line, same in found.values() if same])

    def _found(self, questions: Questions) -> dict[int, tuple[bytes, bool]]:
        """Line of the input -> what answers it, and whether it is the same question. Removes a line that was cut short."""
        by_line = {question.line: question for question in questions.asked}
        with self._named(), open_regular(self.path) as file:
            whole, newline, rest = file.read().rpartition(b"\n")
        found = {}
        lines = whole.split(b"\n") if newline else []
        # What was cut short begins as a line does; anything else is somebody's file.
        lines += [rest] if rest and rest[: len(START)] != START[: len(rest)] else []
        for number, line in enumerate(lines, 1):
            same = False
            try:
                entry = parse_json(line)
                place = entry["line"]
                if place in questions.refused:
                    same = current = True
                else:
                    question = by_line[place]
                    same = (entry["id"], entry["prompt"]) == (question.id, question.prompt)
                    current = "asked" not in entry or entry["asked"] == self.asked(question.request)
            except (JsonError, KeyError, TypeError, AttributeError):
                pass
            if not same:
                raise RequestError(
                    f"--output={self.path}: line {number} is not an answer to a line of the input: give another --output, or "
                    "remove the file"
                )
            found[place] = (line, current)
        if rest:
            with self._named():
                os.truncate(self.path, len(whole) + len(newline))
        return found

    def _keep(self, lines: list[bytes]) -> None:
        part = self.path.with_name(f"{self.path.name}.part")
        file = _locked(part, "wb")
        file.write(b"".join(line + b"\n" for line in lines))
        file.flush()
        os.fsync(file.fileno())
        part.replace(self.path)
        self._file.close()
        self._file = file

    def asked(self, request: Request) -> str:
        """A hash of its turns and of its pictures' bytes; of a picture that cannot be read, of its name."""

        def of(picture: Picture) -> str:
            if isinstance(picture, bytes):
                return hashlib.sha256(picture).hexdigest()
            try:
                return self._sha256(picture)
            except OSError:
                return str(picture)

        parts = [repr(request.turns), *(of(picture) for medium in request.media for picture in medium)]
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]

    def add(self, question: Question, answer: str, *, asked: str) -> None:
        entry = {"line": question.line, "id": question.id, "prompt": question.prompt, "answer": answer, "asked": asked}
        with self._named():
            self._file.write(json.dumps(entry, ensure_ascii=False).encode() + b"\n")

    def flush(self) -> None:
        with self._named():
            self._file.flush()

    def close(self) -> None:
        with self._named():
            self._file.close()

    @contextlib.contextmanager
    def _named(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise RequestError(f"--output={self.path}: {error.strerror or error}") from error


def _locked(path: Path, mode: str) -> BinaryIO:
    """Opened for writing, by one process of the machine at a time."""
    if path.exists() and not path.is_file():
        raise OSError(errno.EINVAL, "is not a regular file")
    while True:
        file = path.open(mode)
        lock(file, "another infer.py is writing it: wait for it, or give another --output")
        if os.path.samestat(os.fstat(file.fileno()), path.stat()):
            return file
        file.close()  # another one replaced the file in between


def answer_file(
    vlm: Any, questions: Questions, *, output: Path, settings: Settings, progress: Callable[[str], None]
) -> list[str]:
    """Answers what is not answered yet, each answer on disk as soon as it is there.

    The samples of a line depend on the seed and its number alone, so that a resumed run gives what an undisturbed one does.

    Args:
      vlm: of `api.load`.
      progress: gets a line of progress now and then, and what is wrong with questions that cannot be asked.

    Returns:
      what was wrong with the questions that are left out.

    Raises:
      RequestError: a wrong output. What was answered before is kept.
    """
    refused = list(questions.refused.values())
    for problem in refused:
        progress(problem)

    def refuse(question: Question, error: Exception) -> None:
        refused.append(f"{questions.path}:{question.line}: {error}")
        progress(refused[-1])

    with contextlib.closing(_Answers(output, questions)) as answers:
        left = [question for question in questions.asked if question.line not in answers.done]
        if answers.done:
            progress(f"{len(questions.asked) - len(left)} of {len(questions.asked)} were answered already")
        if answers.stale:
            progress(f"{counted(answers.stale, 'question')} will be asked again: they or their pictures were changed")
        began, count, window = time.perf_counter(), 0, WINDOW * vlm.generator.rows
        before = len(questions.asked) - len(left)
        for start in range(0, len(left), window):
            some = []
            for question in left[start : start + window]:
                try:
                    prompt = vlm.generator.prompt(question.request, question.line, settings)
                    some.append((question, prompt, answers.asked(question.request)))
                except (RequestError, ImageError) as error:
                    refuse(question, error)
            prompts = [prompt for _, prompt, _ in some]
            for batch in vlm.generator.batches(prompts, settings, refuse=lambda i, error, some=some: refuse(some[i][0], error)):
                for index, answer in batch.items():
                    question, _, asked = some[index]
                    answers.add(question, answer.text, asked=asked)
                answers.flush()
                count += len(batch)
                if batch:
                    rate = count / (time.perf_counter() - began)
                    time_left = human_time((len(left) - count) / rate)
                    progress(f"{before + count}/{len(questions.asked)}  {rate:.3g} answers/s  left {time_left}")
    return refused
