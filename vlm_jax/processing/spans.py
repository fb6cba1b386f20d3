"""The loss mask, from the text: characters of a rendered conversation -> flags of its tokens.

The answers are rendered a second time between two marks, characters that nobody writes; taking the marks out again gives the
spans. Nothing is searched for among tokens.

Axis letter: C tokens.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable
from collections.abc import Set as AbstractSet

import numpy as np

from vlm_jax.processing.layout import ENDS, LEARNED, PROMPT, TokenizedConversation

Span = tuple[int, int]  # of characters: begin, end
Encode = Callable[[str], tuple[list[int], list[Span]]]  # text -> ids, and the characters each stands for; nothing is added

PRIVATE = range(0xE000, 0xF8FF)  # code points without a meaning
CONTEXT = 16  # characters before an answer that its first token may depend on


@dataclasses.dataclass(frozen=True, slots=True)
class Marks:
    """Two characters that none of some texts contains."""

    begin: str
    end: str

    @classmethod
    def unused_in(cls, texts: Iterable[str]) -> Marks:
        used = {letter for text in texts for letter in text if "\ue000" <= letter <= "\uf8ff"}
        free = (chr(code) for code in PRIVATE if chr(code) not in used)
        return cls(next(free), next(free))

    def wrap(self, text: str) -> str:
        return f"{self.begin}{text}{self.end}"

    def strip(self, text: str) -> tuple[str, list[Span]]:
        """The text without the marks, and the spans between them."""
        spans, plain, begin = [], "", None
        for piece in re.split(f"([{self.begin}{self.end}])", text):
            if piece == self.begin:
                begin = len(plain)
            elif piece == self.end:
                spans += [] if begin is None else [(begin, len(plain))]
                begin = None
            else:
                plain += piece
        return plain, spans


def flag_tokens(
    text: str, ids: list[int], offsets: list[Span], *, answers: list[Span], ends: AbstractSet[int]
) -> TokenizedConversation:
    """Tokens of a rendered text, with what is learned of them.

    An answer's tokens are those with a character of it: one that the tokenizer joined with the character before is learned too.
    The end token behind an answer is learned with it, and white space between the two; where the text goes on without one, the
    model learns to end there all the same (`ENDS`).

    Args:
      offsets: the characters each token stands for, as long as `ids`.
      answers: spans, ascending.
      ends: the tokens that end an answer.
    """
    flags = np.full(len(ids), PROMPT, np.uint8)
    begins, stops = np.asarray(offsets, np.int64).reshape(-1, 2).T
    for begin, end in answers:
        flags[(begins < end) & (stops > begin) & (begin < end)] = LEARNED
        behind = np.flatnonzero((begins >= end) & (stops > 0))  # a token that was added in front stands for no character
        first = place = int(behind[0]) if len(behind) else len(ids)
        while place < len(ids) and ids[place] not in ends and text[end : stops[place]].isspace():
            place += 1
        if place < len(ids) and ids[place] in ends:
            flags[first : place + 1] = LEARNED
        elif first:
            flags[first - 1] |= ENDS
    return TokenizedConversation(np.asarray(ids, np.int32), flags)


def tokenize_continuation(encode: Encode, before: str, text: str) -> list[int]:
    """The ids of a text that follows another one, whose own ids stay as they are.

    Tokenised by itself it could begin otherwise: LLaMA's tokenizer puts a space in front of every text. So it is tokenised
    behind its context, or behind another one where the tokenizer joins the two.
    """
    for context in (before[-CONTEXT:], "\n", ":", "a"):
        ids, offsets = encode(context + text)
        first = next((place for place, (begin, _) in enumerate(offsets) if begin >= len(context)), len(ids))
        if all(end <= len(context) for _, end in offsets[:first]):
            return ids[first:]
    return encode(text)[0]


def append_answer(prompt: TokenizedConversation, answer: list[int], end_id: int) -> TokenizedConversation:
    """A prompt and the answer that is learned, with the token that ends it."""
    flags = np.full(len(answer) + 1, LEARNED, np.uint8)
    tokens = np.asarray([*answer, end_id], np.int32)
    return TokenizedConversation(np.concatenate([prompt.tokens, tokens]), np.concatenate([prompt.flags, flags]))
