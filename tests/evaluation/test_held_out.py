"""Solved examples before a held-out question."""

import pytest

from vlm_jax.errors import DataError
from vlm_jax.evaluation.held_out import HeldOut, with_shots
from vlm_jax.generation.request import Request
from vlm_jax.processing.conversation import Medium, media_of, user


def question(number: int, answer: str) -> HeldOut:
    return HeldOut(f"q{number}", Request((user(Medium(0)),), ((f"{number}.png",),)), (answer,))


POOL = [question(0, "a cat"), question(1, "a dog"), question(2, "a cat"), question(3, "a cow"), question(4, "a pig")]


def test_shots_are_others_each_behind_its_own_picture():
    asked = with_shots(POOL, 2, pool=POOL, seed=0)
    for one, plain in zip(asked, POOL, strict=True):
        turns, media = one.request.turns, one.request.media
        assert [turn.role for turn in turns] == ["user", "assistant", "user", "assistant", "user"]
        assert media_of(turns) == [0, 1, 2] and media[2] == plain.request.media[0] and one.answers == plain.answers
        for place in range(2):
            answer = turns[2 * place + 1].text
            (shown,) = [other for other in POOL if other.request.media[0] == media[place]]
            assert shown.answers == (answer,) and answer not in plain.answers
        assert media[0] != media[1]


def test_more_shots_of_a_seed_begin_with_the_fewer_and_another_seed_differs():
    media = lambda count, seed: [one.request.media[:count] for one in with_shots(POOL, count, pool=POOL, seed=seed)]
    assert [all_[:1] for all_ in media(2, 0)] == media(1, 0)
    assert media(2, 0) != media(2, 1)
    assert with_shots(POOL, 0, pool=POOL, seed=0) == POOL


def test_too_few_others_is_an_error():
    with pytest.raises(DataError, match="q0: there are 3 other held-out examples"):
        with_shots(POOL, 4, pool=POOL, seed=0)
