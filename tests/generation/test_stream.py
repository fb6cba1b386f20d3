"""Streams and stop strings of a whole generator."""

import generation_helpers as tiny
import pytest

from vlm_jax.config import MeshConfig
from vlm_jax.config.generation import Settings
from vlm_jax.errors import RequestError

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


def test_tokens_come_while_the_others_are_not_there_yet(monkeypatch):
    generator, steps = tiny.generator(), []
    more = generator.programs.more
    monkeypatch.setattr(generator.programs, "more", lambda *args, **named: steps.append(1) or more(*args, **named))
    stream = generator.stream(question(), Settings(max_new_tokens=NEW))
    first = next(stream)
    assert first and len(steps) < NEW - 1
    stream.close()
    assert len(steps) < NEW - 1
    assert "".join(generator.stream(question(), Settings(max_new_tokens=NEW))).startswith(first)


@pytest.mark.parametrize("mesh", [MeshConfig(data=2, fsdp=2, tensor=2), MeshConfig(data=1, tensor=8)], ids=str)
def test_a_stream_on_several_devices(mesh):
    settings = Settings(max_new_tokens=NEW)
    whole = tiny.generator().generate([question()], settings)[0].text
    pieces = list(tiny.generator(mesh=mesh).stream(question(), settings))
    assert "".join(pieces) == whole and len(pieces) > 3


def test_beams_are_not_streamed():
    with pytest.raises(RequestError, match="beams=3: the best answer is known at the end only"):
        next(tiny.generator().stream(question(), Settings(beams=3)))


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
