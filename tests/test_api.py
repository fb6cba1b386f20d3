"""vlm_jax.load(...): chats, pictures of every kind, settings, and what is said when something is wrong."""

import numpy as np
import pytest
from PIL import Image

import vlm_jax
from vlm_jax.errors import RequestError
from vlm_jax.generation.request import chat_request

NEW = 6


@pytest.fixture(scope="module")
def vlm(run):
    return vlm_jax.load(run)


@pytest.fixture(scope="module")
def halves(tmp_path_factory):
    """A picture file that says it lies on its side, and the pixels that stand in the file."""
    pixels = np.random.default_rng(0).integers(0, 256, (16, 8, 3), np.uint8)
    pixels[:8] //= 4
    path = tmp_path_factory.mktemp("turned") / "turned.png"
    exif = Image.Exif()
    exif[274] = 6
    Image.fromarray(pixels).save(path, exif=exif)
    return path, pixels


def user(*parts):
    return {"role": "user", "content": [part if isinstance(part, dict) else {"type": "text", "text": part} for part in parts]}


def image(picture):
    return {"type": "image", "image": picture}


def answer(text):
    return {"role": "assistant", "content": text}


def scores(vlm, *pictures):
    """What the answer to a question about pictures is made of."""
    made = vlm.answer([vlm.request("which colour?", pictures)], max_new_tokens=NEW)[0]
    return made.tokens, made.log_probabilities


def test_a_chat_of_one_turn_is_a_question(vlm, run):
    picture = str(run / "data" / "1.png")
    expected = vlm.generate("which colour?", [picture], max_new_tokens=NEW)
    assert expected
    assert vlm.chat([user(image(picture), "which colour?")], max_new_tokens=NEW) == expected
    openai = {"type": "image_url", "image_url": {"url": picture}}
    assert vlm.chat([user("which colour?", openai)], max_new_tokens=NEW) == expected
    assert vlm.chat([{"role": "user", "content": "which?"}], max_new_tokens=NEW) == vlm.generate("which?", max_new_tokens=NEW)


def test_a_chat_of_several_turns(vlm, run):
    """A picture in the second turn; it is what `generate` reads as solved examples."""
    picture, other = (str(run / "data" / f"{number}.png") for number in (1, 2))
    turns = [user("hello?"), answer("yes"), user(image(picture), "which colour?"), answer("red"), user("and now?")]
    shots = [([], "hello?", "yes"), (picture, "which colour?", "red")]
    expected = vlm.answer([vlm.request("and now?", examples=shots)], max_new_tokens=NEW)[0]
    made, another = vlm.answer(
        [chat_request(turns), chat_request([*turns[:2], user(image(other), "which colour?"), *turns[3:]])], max_new_tokens=NEW
    )
    assert (made.text, made.tokens) == (expected.text, expected.tokens) and vlm.chat(turns, max_new_tokens=NEW) == made.text
    np.testing.assert_allclose(made.log_probabilities, expected.log_probabilities, atol=1e-5)
    # A question behind the picture sees it: `media="last"`.
    assert np.abs(np.subtract(made.log_probabilities, another.log_probabilities)[0]) > 1e-3


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], r"messages: expected a list of messages, found \[\]"),
        ("hello", "messages: expected a list of messages, found 'hello'"),
        (["hello"], "message 1 is 'hello'; expected an object with 'role' and 'content'"),
        (
            [user("a"), {"role": "gpt", "content": "b"}],
            "message 2 has the role 'gpt'; expected 'system', 'user'",
        ),
        ([user("a", {"type": "audio"})], "message 1, part 2 is {'type': 'audio'}; expected 'type': 'text' or 'image'"),
        ([user(image(3))], "message 1, part 1: a picture is 3; expected a file's path, its bytes, a PIL image or an array"),
        ([user({"type": "video", "frames": ["a.png", None]})], "message 1, part 1: a picture is None"),
        ([user(image("https://a.b/c.png"))], "https://a.b/c.png is an address; fetch the picture first and give its path"),
        ([user({"type": "image_url", "image_url": {"url": "http://a.b/c.png"}})], "http://a.b/c.png is an address"),
        ([user(image("none.png"))], "picture none.png: there is no such file"),
        ([user("a"), answer("b")], "the last message is the assistant's, so there is nothing to answer: end with the user's"),
        ([user("a"), {"role": "assistant", "content": [image("a.png")]}, user("b")], "an assistant's turn has a picture"),
    ],
)
def test_a_wrong_chat(vlm, tmp_path, monkeypatch, messages, message):
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (4, 4)).save("a.png")
    with pytest.raises(ValueError, match=message):
        vlm.chat(messages)


def test_one_picture_needs_no_list(vlm, run):
    path = run / "data" / "1.png"
    expected = scores(vlm, str(path))
    for picture in (str(path), path, path.read_bytes(), Image.open(path), np.asarray(Image.open(path))):
        assert vlm.request("which colour?", picture) == vlm.request("which colour?", [picture])
        made = vlm.answer([vlm.request("which colour?", images=picture)], max_new_tokens=NEW)[0]
        assert (made.tokens, made.log_probabilities) == expected, type(picture)
    shots = [vlm.request("b?", path, [(one, "a?", "red")]) for one in (path, [path])]
    assert shots[0] == shots[1]
    assert scores(vlm, str(run / "data" / "2.png"))[1] != expected[1]


def test_a_turned_picture_is_answered_like_its_file(vlm, halves):
    path, pixels = halves
    expected = scores(vlm, path)
    with Image.open(path) as opened:
        assert scores(vlm, opened) == expected
        assert scores(vlm, opened.copy()) == expected
        assert vlm.request("?", opened).sizes == vlm.request("?", path).sizes == [(8, 16)]
    assert scores(vlm, np.rot90(pixels, -1).copy()) == expected
    assert scores(vlm, pixels)[1] != expected[1]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(num_beams=3), "num_beams=3 is called beams"),
        (dict(do_sample=True), "do_sample=True is called temperature: 0 is greedy, above 0 samples"),
        (dict(max_tokens=3), "max_tokens=3 is called max_new_tokens"),
        (dict(temprature=1), "temprature=1: there is no such setting; did you mean 'temperature'"),
        (dict(verbose=True), "verbose=True: there is no such setting; the settings are max_new_tokens, temperature, top_k, "),
        (dict(temperature="hot"), "temperature='hot': expected a number"),
        (dict(max_new_tokens=None), "max_new_tokens=None: expected a whole number"),
        (dict(top_k=1.5), "top_k=1.5: expected a whole number"),
        (dict(early_stopping="never"), "early_stopping='never': expected True or False"),
        (dict(stop=3), "stop=3: expected strings that are not empty"),
        (dict(stop=["a", ""]), r"stop=\('a', ''\): expected strings that are not empty"),
        (dict(max_new_tokens=0), "max_new_tokens=0: expected 1 or more"),
    ],
    ids=str,
)
def test_a_wrong_setting(vlm, settings, message):
    for ask in (vlm.generate, vlm.stream):
        with pytest.raises(RequestError, match=message):
            list(ask("which?", **settings))


def test_one_stop_string_needs_no_list(vlm):
    whole = vlm.generate("which?", max_new_tokens=NEW)
    stop = whole[2]
    cut = vlm.generate("which?", max_new_tokens=NEW, stop=stop)
    assert cut == whole[: whole.index(stop)].strip() != whole
    assert vlm.generate("which?", max_new_tokens=NEW, stop=[stop]) == cut
    assert vlm.settings(stop="red") == vlm.settings(stop=("red",)) == vlm.settings(stop=["red"])
    assert vlm.settings(top_k=np.int32(3), temperature=np.float32(0.5)).top_k == 3


def test_answer_takes_requests(vlm):
    for wrong in (["hi"], "hi", ["hi", vlm.request("hi")]):
        with pytest.raises(RequestError, match=r"expects Request objects, got 'hi'; build one with vlm\.request\('hi'\)"):
            vlm.answer(wrong)
    request = vlm.request("which?")
    assert vlm.answer(request, max_new_tokens=NEW) == vlm.answer([request], max_new_tokens=NEW)
    assert vlm.answer([]) == []


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (dict(prompt=3), "the prompt is 3; expected a string"),
        (dict(prompt=b"which?"), "the prompt is b'which.'; expected a string"),
        (dict(images=3), "images=3: expected a picture, or a list of them"),
        (dict(images={}), r"images=\{\}: expected a picture"),
        (dict(images=[None]), "image 1: a picture is None; expected a file's path"),
        (dict(images=[[]]), "image 1 is an empty list; expected the frames of a video"),
        (dict(examples=["red"]), r"examples: 'red': expected \(images, question, answer\)"),
        (dict(examples=[((), "which?", 3)]), "the answer of example 1 is 3; expected a string"),
        (dict(examples=[(3, "which?", "red")]), "images=3: expected a picture"),
        (dict(temperature=10**40), "temperature=.*: expected 0"),
    ],
    ids=str,
)
def test_a_wrong_argument(vlm, given, message):
    with pytest.raises(RequestError, match=message):
        vlm.generate(**dict(prompt="which?") | given)
