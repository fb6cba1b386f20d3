"""Tokens -> text, cut at stop strings; whole, or piece by piece while the tokens come."""

from __future__ import annotations

from vlm_jax.processing.processor import Codec

UNFINISHED = "\ufffd"  # what a decoder writes for bytes that are not yet a character


def find_stop(text: str, stop: tuple[str, ...]) -> int | None:
    """Where the first stop string begins, or None."""
    places = [place for place in map(text.find, stop) if place >= 0]
    return min(places, default=None)


def cut(tokenizer: Codec, ids: list[int], stop: tuple[str, ...]) -> tuple[str, int, bool]:
    """The text before the first stop string, how many of the tokens it takes, and whether there was one.

    The last of these tokens may also hold the beginning of the stop string.
    """
    text = tokenizer.decode(ids, special=False)
    place = find_stop(text, stop)
    if place is None:
        return text, len(ids), False
    text, needed = text[:place], len(ids)
    while needed and tokenizer.decode(ids[: needed - 1], special=False).startswith(text):
        needed -= 1
    return text, needed, True


def stop_sequences(tokenizer: Codec, stop: tuple[str, ...]) -> list[list[int]]:
    """The token sequences that surely mean a stop string: as it stands, and after a space.

    They let the device end a row early. Other ways to write the string exist, so the text decides.
    """
    texts = [variant for text in stop for variant in (text, f" {text}")]
    sequences = (tokenizer.encode(text) for text in texts)
    return [ids for ids, text in zip(sequences, texts, strict=True) if ids and text in tokenizer.decode(ids, special=False)]


class TextStream:
    """Tokens in, pieces of text out: only what no later token can take back.

    Held back are unfinished characters, what may be the beginning of a stop string, and white space, which is left away at
    both ends. The pieces together are `Answer.text`.
    """

    def __init__(self, tokenizer: Codec, ends: set[int], stop: tuple[str, ...]) -> None:
        self.tokenizer, self.ends, self.stop = tokenizer, ends, stop
        self.ids: list[int] = []
        self.sent = 0
        self.done = False

    def add(self, token: int) -> str:
        """The text that has become certain; sets `done` at a stop string or an end token."""
        if self.done:
            return ""
        if token in self.ends:
            return self.close()
        self.ids.append(token)
        text = self.tokenizer.decode(self.ids, special=False)
        if find_stop(text, self.stop) is not None:
            return self.close()
        text = text.rstrip(UNFINISHED)
        return self._send(text[: len(text) - self._doubtful(text)].strip())

    def close(self) -> str:
        """The rest."""
        self.done = True
        return self._send(cut(self.tokenizer, self.ids, self.stop)[0].strip())

    def _doubtful(self, text: str) -> int:
        """How many characters at the end may begin a stop string."""
        longest = max((len(stop) - 1 for stop in self.stop), default=0)
        for size in range(min(longest, len(text)), 0, -1):
            if any(stop.startswith(text[-size:]) for stop in self.stop):
                return size
        return 0

    def _send(self, text: str) -> str:
        piece, self.sent = text[self.sent :], max(self.sent, len(text))
        return piece
