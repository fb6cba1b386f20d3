"""Streams and stop strings of a whole generator."""

import generation_helpers as tiny
import jax
import pytest

from vlm_jax.config import MeshConfig
from vlm_jax.config.generation import Settings
from vlm_jax.errors import RequestError
from vlm_jax.sharding import make_mesh

NEW = 16


def question(text: str = "what color?"):
    return tiny.ask(text, [tiny.picture(1)])


def test_pieces_are_the_answer_in_order():
    generator = tiny.generator()
    for settings in (Settings(max_new_tokens=NEW), Settings(max_new_tokens=NEW, temperature=1.0, seed=5)):
        whole = generator.generate([question()], settings)[0].text
        pieces = list(generator.stream(question(), settings))
        assert "".join(pieces) == whole
        assert len(pieces) > 3


def test_tokens_come_while_the_loop_runs():
    generator = tiny.generator()
    stream = generator.stream(question(), Settings(max_new_tokens=NEW))
    first = next(stream)
    stream.close()  # ends the compiled loop, and the thread that waits for it
    assert first and "".join(generator.stream(question(), Settings(max_new_tokens=NEW))).startswith(first)


def test_an_error_in_a_callback_reaches_the_caller(monkeypatch):
    generator = tiny.generator()

    def broken(*_):
        raise ZeroDivisionError("in the callback")

    monkeypatch.setattr("vlm_jax.generation.text.TextStream.add", broken)
    with pytest.raises(ZeroDivisionError, match="in the callback"):
        list(generator.stream(question(), Settings(max_new_tokens=NEW)))


def test_several_devices_cannot_stream():
    one = tiny.generator()
    mesh = make_mesh(MeshConfig(), jax.devices())
    several = tiny.Generator(one.model, one.params, one.processor, mesh)
    with pytest.raises(RequestError, match="8"):
        next(several.stream(question()))


def test_stop_strings_cut_the_text_and_end_the_loop():
    generator = tiny.generator()
    free = generator.generate([question()], Settings(max_new_tokens=NEW))[0]
    decode = lambda ids: generator.processor.tokenizer.decode(ids, special=False)
    text = decode(free.tokens)
    # From the middle of a token, if one of several characters is there, over the next ones.
    begin = len(decode(free.tokens[:4])) + len(decode(free.tokens[4:5])) // 2
    stop = text[begin : begin + 4]
    begin = text.index(stop)
    stopped = generator.generate([question()], Settings(max_new_tokens=NEW, stop=(stop,)))[0]
    assert stopped.text == text[:begin].strip()
    assert stopped.finish_reason == "stop_string"
    assert stopped.tokens == free.tokens[: len(stopped.tokens)]
    assert decode(stopped.tokens).startswith(text[:begin])
    assert len(stopped.log_probabilities) == len(stopped.tokens) < NEW
    assert "".join(generator.stream(question(), Settings(max_new_tokens=NEW, stop=(stop,)))) == stopped.text


def test_a_stop_sequence_ends_the_device_loop(monkeypatch):
    generator = tiny.generator()
    free = generator.generate([question()], Settings(max_new_tokens=NEW))[0]
    sequence = free.tokens[3:6]
    monkeypatch.setattr("vlm_jax.generation.generator.stop_sequences", lambda *_: [[1, 2, 3, 4], sequence])
    ended = generator.generate([question()], Settings(max_new_tokens=NEW, stop=("never written",)))[0]
    assert ended.tokens == free.tokens[:6]
    assert ended.finish_reason == "stop_string"
