"""Questions with their right answers, from the examples of a source."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np

from vlm_jax.data.example import Source
from vlm_jax.errors import DataError
from vlm_jax.generation.request import Request
from vlm_jax.processing.conversation import assistant, joined


@dataclasses.dataclass(frozen=True, slots=True)
class HeldOut:
    """A question about held-out media."""

    id: str  # of its example
    request: Request
    answers: tuple[str, ...]  # all of them right: captions of one picture, answers of several annotators

    def with_answer(self, text: str) -> Request:
        """The same conversation, answered."""
        return dataclasses.replace(self.request, turns=(*self.request.turns, assistant(text)))


def held_out_questions(source: Source, most: int = 0, *, skip: bool = False) -> list[HeldOut]:
    """The last answers of all conversations, with what stands before them.

    Conversations of an example that differ in their last answer alone are one question with several right answers.

    Args:
      most: that many, evenly spread over the source; 0: all.
      skip: whether records that cannot be read are passed over; where the data are tokenised they are counted and reported.

    Raises:
      DataError: a record that cannot be read, or a conversation that does not end with an answer.
    """
    found: list[HeldOut] = []
    for index in evenly(len(source), most):
        try:
            example = source[index]
        except DataError:
            if skip:
                continue
            raise
        answers: dict[tuple, list[str]] = {}
        for *before, last in example.conversations:
            if last.role != "assistant":
                raise DataError(
                    f"{example.id}: an evaluator asks for the last answer, but a turn of {last.role!r} ends the conversation: "
                    "evaluate on held-out data whose conversations end with the assistant's turn"
                )
            answers.setdefault(tuple(before), []).append(last.text.strip())
        found += [HeldOut(example.id, Request(turns, example.media), tuple(all_)) for turns, all_ in answers.items()]
    return [found[place] for place in evenly(len(found), most)]


def with_shots(questions: list[HeldOut], count: int, *, pool: list[HeldOut], seed: int) -> list[HeldOut]:
    """The questions behind solved examples, whose answers are learned from the prompt alone (Brown et al. 2020).

    Args:
      count: solved examples before each question; 0: none.
      pool: what they are drawn from, for each question anew. None is about the question's own example or has its answer.
      seed: of the draw; the first `count` of one seed are the same for every `count`.

    Raises:
      DataError: a question for which there are too few.
    """
    if not count:
        return questions
    found = []
    for number, question in enumerate(questions):
        order = np.random.default_rng((seed, number)).permutation(len(pool))
        fits = lambda other, question=question: other.id != question.id and not set(other.answers) & set(question.answers)
        shown = list(itertools.islice(filter(fits, (pool[place] for place in order)), count))
        if len(shown) < count:
            raise DataError(f"{question.id}: there are {len(shown)} other held-out examples to show before it, not {count}")
        solved = [shot.with_answer(shot.answers[0]) for shot in shown]
        turns, media = joined([(part.turns, part.media) for part in (*solved, question.request)])
        found.append(dataclasses.replace(question, request=dataclasses.replace(question.request, turns=turns, media=media)))
    return found


def evenly(count: int, most: int) -> list[int]:
    """At most `most` of the numbers 0..count-1, evenly spread; 0: all of them.

    evenly(10, 4) -> [0, 3, 6, 9]
    """
    if not most or count <= most:
        return list(range(count))
    return np.linspace(0, count - 1, most).round().astype(int).tolist()
