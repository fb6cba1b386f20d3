import dataclasses
import json

import pytest
from PIL import Image

from vlm_jax.config import StampsConfig
from vlm_jax.data.example import Example
from vlm_jax.data.sources.jsonl import JsonLinesSource
from vlm_jax.errors import RequestError
from vlm_jax.evaluation.own_answers import AT_ONCE, _data, answers_of, questions_of, scores, write_pairs
from vlm_jax.processing.conversation import Medium, Text, Turn, assistant, user


@dataclasses.dataclass
class Said:
    text: str


class SaysYes:
    """A model that says yes to everything, and counts what it is asked at once."""

    def __init__(self) -> None:
        self.asked = []

    def answer(self, requests, **settings):
        self.asked.append(len(requests))
        assert settings == {"temperature": 0.5} and all(request.turns[-1].role == "user" for request in requests)
        return [Said(" yes") for _ in requests]


@pytest.fixture
def source(tmp_path):
    """20 pictures with a question of each kind."""
    path = tmp_path / "a.png"
    Image.new("RGB", (8, 8)).save(path)
    medium = user(Medium(0), Text("is it red?"))
    conversations = ((medium, assistant("yes")), (medium, assistant("no")), (user(Text("what?")), assistant("red")))
    return [Example(f"x/{number}", ((path.read_bytes(),),), conversations) for number in range(20)]


def test_scores_of_a_model_that_always_says_yes(source):
    model = SaysYes()
    found = scores(list(answers_of(model, source, limit=50, temperature=0.5)))
    assert model.asked == [50]
    assert found["questions"] == 50 and found["yes_no_questions"] == 34
    assert found["accuracy"] == pytest.approx(17 / 50)
    assert (found["yes_no_accuracy"], found["yes_no_yes_share"], found["yes_no_recall"]) == (0.5, 1, 1)
    many = list(answers_of(model, source * 5, temperature=0.5))
    assert model.asked[1:] == [AT_ONCE, 300 - AT_ONCE] and len(many) == 300


def test_wrong_answers_become_pairs_that_are_read_again(source, tmp_path):
    answers = list(answers_of(SaysYes(), source, temperature=0.5))
    folder = tmp_path / "pairs"
    assert write_pairs(answers, source, folder) == {"train": 36, "eval": 4}  # of pictures 0 and 10
    read = JsonLinesSource(folder / "train.jsonl", "", cache_dir=tmp_path / "cache")
    assert len(read) == 36 and len(JsonLinesSource(folder / "eval.jsonl", "", cache_dir=tmp_path / "cache")) == 4
    one, other = read[0], read[1]
    assert one.pairs and one.conversations == (
        (user(Medium(0), Text("is it red?")), assistant("no")),
        (user(Medium(0), Text("is it red?")), assistant("yes")),
    )
    assert one.media == ((str(folder / "pictures" / "1-0.png"),),)
    assert (folder / "pictures" / "1-0.png").read_bytes() == source[1].media[0][0]
    assert other.media == () and [turns[-1].text for turns in other.conversations] == ["red", "yes"]
    with pytest.raises(RequestError, match="the folder is not empty"):
        write_pairs(answers, source, folder)


def test_every_turn_is_asked_with_the_true_answers_before_it():
    turns = (user(Text("a?")), assistant("A"), user(Text("b?")), assistant("B"))
    example = Example("x", (), (turns,))
    assert list(questions_of(example)) == [(turns[:1], "A"), (turns[:3], "B")]
    wrong = (*turns[:3], assistant("C"))
    first = (*turns[:1], Turn("assistant", (Text("A"),)), *turns[2:])
    assert list(questions_of(Example("x", (), (first, wrong), pairs=True))) == [(first[:3], "B")]


def test_a_text_with_pictures_is_no_question(tmp_path):
    turns = (Turn("text", (Text("A page."),)), Turn("text", (Text("b"),), learn=True))
    assert not list(questions_of(Example("x", (), (turns,))))
    assert json.dumps(scores([]))


def test_another_data_set_is_asked_with_the_runs_processing(run):
    other = _data(str(run), "stamps:folder=/stamps")
    assert other.source == StampsConfig(folder="/stamps")
    assert dataclasses.replace(other, source=_data(str(run), None).source) == _data(str(run), None)
    with pytest.raises(ValueError, match="folders"):
        _data(str(run), "stamps:folders=/stamps")
