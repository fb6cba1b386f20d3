"""Asks a model the questions of a data set: to probe it, or to make pairs for DPO of its own wrong answers.

    python -m vlm_jax.evaluation.own_answers --checkpoint=runs/stage2 --split=eval --source=easy_vqa
    python -m vlm_jax.evaluation.own_answers --checkpoint=runs/stage2 --split=train --limit=8000 --pairs=own_pairs

Both print one line of JSON: `accuracy` over all questions, and POPE's scores of those whose answer is yes or no. With `--pairs`
a folder is written: the right answers as chosen and the model's wrong ones as rejected, `train.jsonl` and, of every tenth
picture, `eval.jsonl` (TRL's form, see `data/sources/jsonl.py`), and the pictures. A question of several turns is asked with the
true answers of the turns before it. The data set is the run's own, or another (`--source`).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import vlm_jax
from vlm_jax import runtime
from vlm_jax.config import DataConfig
from vlm_jax.config_dict import from_dict, kind_of, to_dict
from vlm_jax.data.example import Example, Source
from vlm_jax.data.pipeline import build_source
from vlm_jax.errors import RequestError
from vlm_jax.evaluation.pope import pope
from vlm_jax.generation.request import Request
from vlm_jax.processing.conversation import Conversation, Text, media_of
from vlm_jax.progress import Countdown
from vlm_jax.training.run_folder import read_config

log = logging.getLogger("vlm_jax.evaluation.own_answers")  # with `python -m`, __name__ is another

AT_ONCE = 256  # questions
HELD_OUT = 10  # every so many pictures' pairs are for the evaluation


@dataclasses.dataclass(frozen=True)
class Answered:
    """A question of a data set and what the model said."""

    example: int  # its number
    turns: Conversation  # up to the question
    truth: str
    said: str

    @property
    def right(self) -> bool:
        return self.said == self.truth


def questions_of(example: Example) -> Iterator[tuple[Conversation, str]]:
    """What is asked and the right answer: of every assistant's turn that is learned. Of pairs, only the chosen answers."""
    for conversation in example.conversations[:: 2 if example.pairs else 1]:
        for place, turn in enumerate(conversation):
            if turn.role == "assistant" and turn.learn:
                yield conversation[:place], turn.text.strip()


def answers_of(vlm: vlm_jax.Vlm, source: Source, *, limit: int = 0, **settings: Any) -> Iterator[Answered]:
    """The model's answers to the questions of a source, in its order.

    Args:
      limit: at most so many questions; 0: all.
      settings: of the generation.

    Raises:
      RequestError: a question that the model cannot be asked.
    """
    waiting: list[tuple[int, Conversation, str, Request]] = []

    def answered() -> Iterator[Answered]:
        found = vlm.answer([request for *_, request in waiting], **settings)
        for (number, turns, truth, _), answer in zip(waiting, found, strict=True):
            yield Answered(number, turns, truth, answer.text.strip())
        waiting.clear()

    asked = 0
    what = "questions asked: {}" if limit else "examples asked about: {}"
    countdown = Countdown(log.info, what, limit or len(source))
    for number in range(len(source)):
        countdown.at(asked if limit else number)
        example = source[number]
        for turns, truth in questions_of(example):
            if limit and asked == limit:
                break
            waiting.append((number, turns, truth, Request(turns, example.media, seed=asked)))
            asked += 1
            if len(waiting) == AT_ONCE:
                yield from answered()
        if limit and asked == limit:
            break
    if waiting:
        yield from answered()


def scores(answers: list[Answered]) -> dict[str, float]:
    """`accuracy` and `questions` of all; POPE's scores of those that are answered by yes or no, as `yes_no_...`."""
    closed = [one for one in answers if one.truth in ("yes", "no")]
    found = {"accuracy": sum(one.right for one in answers) / max(len(answers), 1), "questions": float(len(answers))}
    of_closed = pope([one.said for one in closed], [one.truth for one in closed])
    return found | {f"yes_no_{name}": value for name, value in of_closed.items()}


def write_pairs(answers: list[Answered], source: Source, folder: Path) -> dict[str, int]:
    """The wrong answers as pairs for DPO.

    Returns:
      how many there are in each file.

    Raises:
      RequestError: the folder is not empty, or a question is no chat about pictures.
    """
    if folder.exists() and any(folder.iterdir()):
        raise RequestError(f"--pairs={folder}: the folder is not empty: choose another one")
    (folder / "pictures").mkdir(parents=True)
    lines: dict[str, list[str]] = {"train": [], "eval": []}
    for one in answers:
        if not one.right:
            say = lambda text: [{"role": "assistant", "content": text}]
            record = _question(one, source[one.example], folder) | {"chosen": say(one.truth), "rejected": say(one.said)}
            lines["train" if one.example % HELD_OUT else "eval"].append(json.dumps(record, ensure_ascii=False) + "\n")
    for name, of_file in lines.items():
        (folder / f"{name}.jsonl").write_text("".join(of_file))
    return {name: len(of_file) for name, of_file in lines.items()}


def _question(one: Answered, example: Example, folder: Path) -> dict[str, Any]:
    """`prompt` and `images` of a record, with the pictures written."""
    names = []
    for index in media_of(one.turns):
        medium = example.media[index]
        if len(medium) > 1 or not isinstance(medium[0], str | bytes):
            raise RequestError(f"{example.id}: a pair can have pictures, and this is a video of {len(medium)} frames")
        path = folder / "pictures" / f"{one.example}-{index}.png"
        if not path.exists():
            path.write_bytes(medium[0] if isinstance(medium[0], bytes) else Path(medium[0]).read_bytes())
        names.append(f"pictures/{path.name}")
    if any(turn.role == "text" for turn in one.turns):
        raise RequestError(f"{example.id}: is a text with pictures, and pairs are made of questions and answers")
    of = lambda part: {"type": "text", "text": part.text} if isinstance(part, Text) else {"type": "image"}
    prompt = [{"role": turn.role, "content": [of(part) for part in turn.content]} for turn in one.turns]
    return {"images": names, "prompt": prompt}


def _data(checkpoint: str, source: str | None) -> DataConfig:
    data = read_config(checkpoint).data
    return from_dict(DataConfig, to_dict(data) | {"source": kind_of(source)}) if source else data


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="own_answers", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    add = parser.add_argument
    add("--checkpoint", required=True, metavar="RUN", help="the --workdir of a run of train.py")
    add("--step", type=int, help="which checkpoint (default: the newest)")
    add("--source", metavar="KIND:SETTING=VALUE,...", help="the data set that is asked (default: the checkpoint's own)")
    add("--split", choices=("train", "eval"), default="eval", help="which of its two sets (default: %(default)s)")
    add("--limit", type=int, default=0, metavar="N", help="at most so many questions (default: all)")
    add("--pairs", type=Path, metavar="FOLDER", help="a new folder for pairs made of the wrong answers")
    add("--temperature", type=float, default=0.0, help="0: greedy; above it answers are sampled, and more are wrong")
    add("--max-new-tokens", type=int, default=16, metavar="N", help="of an answer (default: %(default)s)")
    add("--batch", type=int, default=64, metavar="N", help="questions answered at once (default: %(default)s)")
    asked = parser.parse_args(argv)
    logging.basicConfig(format="%(message)s")
    logging.getLogger("vlm_jax").setLevel(logging.INFO)
    runtime.prepare()
    try:
        vlm = vlm_jax.load(asked.checkpoint, step=asked.step, rows=asked.batch)
        source = build_source(_data(asked.checkpoint, asked.source), asked.split)
        settings = {"temperature": asked.temperature, "max_new_tokens": asked.max_new_tokens}
        answers = list(answers_of(vlm, source, limit=asked.limit, **settings))
        found: dict[str, float] = scores(answers)
        if asked.pairs:
            found |= {f"pairs_{name}": count for name, count in write_pairs(answers, source, asked.pairs).items()}
    except (ValueError, OSError) as error:
        print(f"own_answers: {error}", file=sys.stderr)
        return 1
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
