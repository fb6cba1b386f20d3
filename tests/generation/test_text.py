"""Text of tokens: stop strings, and pieces that no later token can take back."""

import generation_helpers as tiny
import pytest

from vlm_jax.generation.text import TextStream, cut, stop_sequences


class Pieces:
    """A tokenizer of given pieces of bytes."""

    def __init__(self, *pieces: str | bytes):
        self.pieces = [piece if isinstance(piece, bytes) else piece.encode() for piece in pieces]

    def decode(self, ids, special=True):
        return b"".join(self.pieces[i] for i in ids).decode(errors="replace")


@pytest.mark.parametrize(
    ("pieces", "stop", "text", "needed"),
    [
        (["red", "\n", "no"], ("\n",), "red", 1),
        (["a b", "cd", "e f"], ("cde",), "a b", 1),  # spans tokens
        (["a bc", "de", "f"], ("cde",), "a b", 1),  # begins within a token
        (["a", "bcdef"], ("cd",), "ab", 2),  # begins and ends within one
        (["ab", "cd"], ("x", "d", "bc"), "a", 1),  # the first place counts, not the first string
        (["ab"], ("ab",), "", 0),
        (["ab", "c"], ("x",), "abc", 2),
    ],
)
def test_cut(pieces, stop, text, needed):
    assert cut(Pieces(*pieces), list(range(len(pieces))), stop) == (text, needed, text != "".join(pieces))
    stream = TextStream(Pieces(*pieces), set(), stop)
    said = [stream.add(i) for i in range(len(pieces))]
    assert "".join([*said, stream.close()]) == text.strip()


def test_pieces_wait_until_they_are_certain():
    stream = TextStream(Pieces(" red", " ", b"\xc3", b"\xa9", "\n", "\nQ", " x"), {99}, ("\n\n",))
    assert [stream.add(i) for i in range(5)] == ["red", "", "", " é", ""]
    assert stream.add(5) == "" and stream.done  # "\n\nQ": what came before it was all
    assert stream.add(6) == "" and stream.close() == ""

    stream = TextStream(Pieces("a", "STO", "RY"), {99}, ("STOP",))
    assert [stream.add(i) for i in range(3)] == ["a", "", "STORY"]
    assert stream.add(99) == "" and stream.done


def test_unfinished_characters_at_the_end_are_shown():
    stream = TextStream(Pieces("a", b"\xc3"), set(), ())
    assert stream.add(0) + stream.add(1) + stream.close() == "a\ufffd"


def test_stop_sequences_are_written_as_the_stop_string():
    tokenizer = tiny.tokenizer()
    found = stop_sequences(tokenizer, ("shape", "\n"))
    assert tokenizer.encode("shape") in found and tokenizer.encode(" shape") in found
    assert stop_sequences(tokenizer, ()) == []
