"""How answers are generated."""

from __future__ import annotations

import dataclasses
import difflib
import numbers
from typing import Any

from vlm_jax.errors import RequestError, check_text

# Names of these settings in other libraries, and ours.
OTHER_NAMES = {
    "num_beams": "beams",
    "do_sample": "temperature: 0 is greedy, above 0 samples",
    "max_tokens": "max_new_tokens",
    "max_length": "max_new_tokens, which counts the answer alone",
    "stop_strings": "stop",
    "random_seed": "seed",
}
MOST = 1e38  # in float32
KINDS = {"int": (numbers.Integral, "a whole number"), "float": (numbers.Real, "a number"), "bool": (bool, "True or False")}


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """How answers are generated.

    `stop` ends an answer where its text first contains one of the strings, which may begin and end within tokens; the text
    is cut before it.
    """

    max_new_tokens: int = 64
    temperature: float = 0.0  # 0: greedy
    top_k: int = 0  # sample from the k most likely tokens; 0: all
    top_p: float = 1.0  # sample from the most likely tokens with total probability p
    repetition_penalty: float = 1.0  # above 1 penalises tokens already in the prompt or the answer
    beams: int = 1  # above 1: beam search, which is deterministic and does not support stop strings
    length_penalty: float = 1.0  # beam search: an answer's score is its log-probability / its length to this power
    early_stopping: bool = False  # beam search: end as soon as that many answers are finished
    stop: tuple[str, ...] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        def check(name: str, good: bool, expected: str) -> None:
            if not good:
                raise RequestError(f"{name}={getattr(self, name)!r}: expected {expected}")

        for field in dataclasses.fields(self):
            kind, expected = KINDS.get(field.type, (object, ""))
            check(field.name, isinstance(getattr(self, field.name), kind), expected)
        check("max_new_tokens", self.max_new_tokens >= 1, "1 or more")
        check("temperature", 0 <= self.temperature < MOST, "0 (greedy) or more")
        check("top_k", 0 <= self.top_k < 2**31, "0 (all tokens) or more")
        check("top_p", 0 < self.top_p <= 1, "more than 0 and at most 1")
        check("repetition_penalty", 0 < self.repetition_penalty < MOST, "more than 0")
        check("beams", 1 <= self.beams < 2**31, "1 or more")
        check("length_penalty", abs(self.length_penalty) < MOST, "a number")
        if self.beams > 1 and (self.temperature or self.stop):
            raise RequestError(
                f"beams={self.beams}: beam search neither samples nor knows stop strings: set temperature=0 and leave stop "
                "out, or set beams=1"
            )
        strings = isinstance(self.stop, tuple) and all(isinstance(text, str) and text for text in self.stop)
        check("stop", strings, "strings that are not empty")
        for text in self.stop:
            check_text("stop", text)
        check("seed", 0 <= self.seed < 2**63, "0 or more")

    def changed(self, **changes: Any) -> Settings:
        """These settings with some changed.

        Raises:
          RequestError: an unknown setting (with the closest name), or an invalid value.
        """
        known = [field.name for field in dataclasses.fields(self)]
        for name, value in changes.items():
            if name in OTHER_NAMES:
                raise RequestError(f"{name}={value!r} is called {OTHER_NAMES[name]}")
            if name not in known:
                near = difflib.get_close_matches(name, known, n=1)
                meant = f"did you mean {near[0]!r}? The" if near else "the"
                raise RequestError(f"{name}={value!r}: there is no such setting; {meant} settings are {', '.join(known)}")
        match changes.get("stop", ()):
            case str(stop):
                changes["stop"] = (stop,)
            case list(stop):
                changes["stop"] = tuple(stop)
        return dataclasses.replace(self, **changes)
