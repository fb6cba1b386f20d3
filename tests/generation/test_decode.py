"""Generation against repeated full forward passes, in every grouping, bucket and mesh."""

import copy
import functools

import generation_helpers as tiny
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.tiny import thorough
from vlm_jax.config import MeshConfig
from vlm_jax.config.generation import Settings
from vlm_jax.errors import RequestError
from vlm_jax.generation import decode
from vlm_jax.generation.buckets import bucket, row_bucket
from vlm_jax.generation.request import Request, interleaved
from vlm_jax.models.vlm import VisionLanguageModel
from vlm_jax.processing.conversation import Shot

NEW = 10
LENGTH, SLOTS, FRAMES = 96, 3, 2


@functools.cache
def forward(config):
    model = VisionLanguageModel(config)
    return jax.jit(lambda params, batch: model.apply({"params": params}, batch))


def reference(config, request: Request, new: int = NEW) -> tuple[list[int], list[float]]:
    """Greedy decoding without cache, padding or buckets: the whole sequence anew for every token."""
    generator, vocabulary = tiny.generator(config), tiny.tokenizer()
    layout = generator.processor.lay_out(request.turns, request.sizes, open=True)
    tokens, last, first = (array.tolist() for array in (layout.tokens, layout.media_last, layout.media_first))
    batch = tiny.zeros_batch(1, LENGTH, SLOTS, FRAMES)
    for slot, film in enumerate(request.media):
        batch.frames[0, slot] = len(film)
        for frame, picture in enumerate(film):
            batch.images[0, slot, frame] = picture
    chosen, scores = [], []
    for _ in range(new):
        count = len(tokens)
        batch.tokens[0, :count], batch.media_last[0, :count], batch.media_first[0, :count] = tokens, last, first
        batch.positions[0, :count], batch.segments[0, :count] = np.arange(count), 1
        logits = np.asarray(forward(config)(tiny.params(config)[0], batch))[0, count - 1]
        allowed = np.ones(len(logits), bool)
        allowed[[vocabulary.pad_id, vocabulary.bos_id, vocabulary.image_id]] = False
        allowed[vocabulary.vocab_size :] = False
        token = int(np.argmax(np.where(allowed, logits, -np.inf)))
        chosen.append(token)
        scores.append(float(jax.nn.log_softmax(logits)[token]))
        if token in generator.processor.ends:
            break
        tokens, last, first = [*tokens, token], [*last, last[-1]], [*first, first[-1]]
    return chosen, scores


def requests():
    """Different lengths and numbers of images, one without any, one film."""
    picture = tiny.picture
    return [
        tiny.ask("what color?", [picture(1)]),
        tiny.ask("how many?"),
        tiny.ask("is <image> or <image> a circle, and what color is the shape?", [picture(1), picture(2)]),
        tiny.ask("a?", [picture(4)], [Shot([picture(3)], "what?", "red"), Shot([picture(5)], "b", "no")]),
        tiny.ask("what moves?", [[picture(6), picture(7)]]),
        interleaved([picture(1), "what", picture(2), " color?"]),
    ]


def check(config, generator, requests) -> None:
    answers = generator.generate(requests, Settings(max_new_tokens=NEW))
    for request, answer in zip(requests, answers, strict=True):
        tokens, scores = reference(config, request)
        assert answer.tokens == tokens
        np.testing.assert_allclose(answer.log_probabilities, scores, atol=2e-4)


@pytest.mark.parametrize(
    "variant",
    [{}, {"media": "all_previous", "layers": 4, "every": 3, "class_token": "kept"}],
    ids=["last image", "all images"],
)
def test_batched_equals_repeated_forward_passes(variant):
    config = tiny.model_config(**variant)
    check(config, tiny.generator(config), requests())


def test_alone_or_together_and_any_padding():
    """The first request is padded to 32 tokens alone, and to 64 with the others."""
    config, asked = tiny.model_config(), requests()
    generator = tiny.generator(config)
    together = generator.generate(asked, Settings(max_new_tokens=NEW))
    assert [
        generator.place([generator.prompt(r, 0, Settings()) for r in some]).tokens.shape[1] for some in (asked, asked[:1])
    ] == [64, 32]
    for number in (0, 1):  # with an image, and without: other programs
        check(config, generator, [asked[number]])
        alone = generator.generate([asked[number]], Settings(max_new_tokens=NEW))[0]
        np.testing.assert_allclose(alone.log_probabilities, together[number].log_probabilities, atol=1e-4)


def test_language_model_alone():
    config = tiny.model_config(has_vision=False)
    check(config, tiny.generator(config), [tiny.ask("how many?"), tiny.ask("is there a circle or not?")])
    with pytest.raises(RequestError, match="leave them out"):
        tiny.generator(config).generate([tiny.ask("what?", [tiny.picture(1)])])


def test_answers_depend_on_the_image():
    generator = tiny.generator()
    asked = [tiny.ask("what?", [tiny.picture(seed)]) for seed in (1, 2)]
    first, second = (generator.generate([request], Settings(max_new_tokens=NEW))[0] for request in asked)
    assert first.tokens != second.tokens


@pytest.mark.parametrize(
    "mesh",
    [
        *(thorough(MeshConfig(**sizes)) for sizes in (dict(data=8), dict(data=1, fsdp=8), dict(data=1, tensor=8))),
        MeshConfig(data=2, fsdp=2, tensor=2),
    ],
    ids=str,
)
def test_meshes_give_the_same_tokens(mesh):
    config, asked = tiny.model_config(), requests()
    one, many = tiny.generator(config), tiny.generator(config, mesh)
    for settings in (Settings(max_new_tokens=NEW), Settings(max_new_tokens=NEW, temperature=1.0, top_p=0.9)):
        expected = one.generate(asked, settings)
        assert [answer.tokens for answer in many.generate(asked, settings)] == [answer.tokens for answer in expected]


def test_similar_requests_compile_nothing():
    generator = tiny.generator()
    one = tiny.ask("what color?", [tiny.picture(1)])
    generator.generate([one], Settings(max_new_tokens=9))
    generator.generate(requests(), Settings(max_new_tokens=9))
    before = generator.programs.compiled()
    for settings in (
        Settings(max_new_tokens=16),
        Settings(max_new_tokens=17),
        Settings(max_new_tokens=60),
        Settings(max_new_tokens=3, temperature=0.7, top_k=5, top_p=0.5, seed=3),
        Settings(stop=("red", "no", "a", "b", "c"), max_new_tokens=12),
    ):
        generator.generate([tiny.ask("is there a circle?", [tiny.picture(2)])], settings)
        generator.generate([*requests(), one], settings)
        list(generator.stream(one, settings))
    assert generator.programs.compiled() == before
    # Four rows without an image: the prompts are read by another program, and so are what follows them.
    generator.generate([tiny.ask("how many?")] * 3, Settings(max_new_tokens=9))
    assert generator.programs.compiled() == before + 3


def test_rows_come_and_go_in_a_running_state():
    """As a server has it: a short answer gives its place to another question while the others go on."""
    generator, settings = tiny.generator(), Settings(max_new_tokens=NEW)
    asked = requests()[0], tiny.ask("how many?", [tiny.picture(8)]), tiny.ask("is it red?", [tiny.picture(9)])
    expected = [answer.tokens for answer in generator.generate(list(asked), settings)]
    begun = lambda some: generator.started([generator.prompt(request, 0, settings) for request in some], settings)
    program = lambda fn: jax.jit(functools.partial(fn, generator.model))
    with jax.set_mesh(generator.mesh):
        (state, first), constraints = begun(asked[:2])
        (late, of_late), _ = begun(asked[2:])
        step, put = program(decode.step), jax.jit(decode.insert)
        tokens = {0: [int(first.tokens[0])], 1: [int(first.tokens[1])]}
        for number in range(2 * NEW):
            if number == 3:  # the second row is given to the third question
                state, tokens[2] = put(state, np.array([1]), late), [int(of_late.tokens[0])]
            state, next_tokens = step(generator.programs.held, state, constraints)
            for row, question in ((0, 0), (1, 2 if number >= 3 else 1)):
                tokens[question].append(int(next_tokens.tokens[row]))
    assert tokens[0][:NEW] == expected[0] and tokens[2][:NEW] == expected[2]
    assert tokens[1] == expected[1][: len(tokens[1])] and len(tokens[1]) == 4
    assert int(state.count[0]) == int(state.count[1]) == NEW


def test_buckets():
    assert [bucket(n) for n in (0, 1, 2, 3, 5, 8, 9)] == [0, 1, 2, 4, 8, 8, 16]
    assert bucket(5, 32) == 32 and bucket(33, 32) == 64
    assert row_bucket(3, 1) == 4 and row_bucket(3, 8) == 8 and row_bucket(9, 6) == 18


def test_special_tokens_are_never_generated():
    config = tiny.model_config()
    plain, _ = tiny.params(config)
    vocabulary = tiny.tokenizer()
    banned = [vocabulary.pad_id, vocabulary.bos_id, vocabulary.image_id, *range(vocabulary.vocab_size, 304)]
    assert len(banned) > 3
    generator = copy.copy(tiny.generator(config))
    generator.programs = copy.copy(generator.programs)
    generator.programs.held = _louder(plain, banned)
    answers = generator.generate(requests(), Settings(max_new_tokens=16, temperature=1.0))
    assert not {token for answer in answers for token in answer.tokens} & set(banned)
    assert max(score for answer in answers for score in answer.log_probabilities) < -1  # the others are likelier


def _louder(plain, tokens):
    """The same parameters with a head that shouts some tokens: both signs, for the hidden state's is not known."""
    kernel = plain["language"]["lm_head"]["kernel"]
    half = len(tokens) // 2
    loud = kernel.at[:, jnp.asarray(tokens[:half])].mul(8.0).at[:, jnp.asarray(tokens[half:])].mul(-8.0)
    return plain | {"language": plain["language"] | {"lm_head": {"kernel": loud}}}


def test_end_tokens_end_a_row_alone():
    config = tiny.model_config()
    asked = requests()
    free = tiny.generator(config).generate(asked, Settings(max_new_tokens=NEW))
    # The third token of the first answer is made an end token.
    generator, end = copy.copy(tiny.generator(config)), free[0].tokens[2]
    generator.processor = copy.copy(generator.processor)  # others have it too
    generator.processor.ends = {generator.processor.tokenizer.eoc_id, end}
    for answer, before in zip(generator.generate(asked, Settings(max_new_tokens=NEW)), free, strict=True):
        place = before.tokens.index(end) + 1 if end in before.tokens else NEW
        assert answer.tokens == before.tokens[:place]
        assert answer.finish_reason == ("end_token" if end in before.tokens else "max_new_tokens")
        assert len(answer.log_probabilities) == len(answer.tokens)


def test_positions_limit_the_answer_and_the_prompt():
    generator = tiny.generator(tiny.model_config(has_vision=False))
    answer = generator.generate([tiny.ask("x" * 105)], Settings(max_new_tokens=16))[0]
    assert answer.finish_reason == "max_positions"
    assert answer.prompt_tokens + len(answer.tokens) == 128
    with pytest.raises(RequestError, match="reads at most 128"):
        generator.generate([tiny.ask("x" * 200)])
