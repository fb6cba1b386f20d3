"""Sequences about one image that share their visual tokens in a row: the predictions of each sequence alone."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from PIL import Image

from tests.data.data_helpers import byte_tokenizer
from tests.tiny import random_params, tiny_run
from vlm_jax.config import AlibiConfig, DynamicNtkScaling, InSequenceConfig, MlpProjectorConfig
from vlm_jax.data.example import Example, Source
from vlm_jax.data.packing import plan_epoch
from vlm_jax.data.pipeline import eval_batches, tokens_of
from vlm_jax.data.sources.mixture import MixedSource
from vlm_jax.models.vlm import VisionLanguageModel
from vlm_jax.processing.conversation import Medium, Text, assistant, user
from vlm_jax.processing.recipe import RecipeProcessor
from vlm_jax.training.objectives.next_token import NextToken
from vlm_jax.training.sets import check_data

QUESTIONS = ("what?", "is it red?", "how so?", "colour?")


class Asked(Source):
    """Images with one to four questions each; one image has none of its own."""

    fingerprint = "asked"

    def __len__(self) -> int:
        return 5

    def __getitem__(self, index: int) -> Example:
        picture = Image.fromarray(np.random.default_rng(index).integers(0, 256, (16, 16, 3)).astype(np.uint8))
        turns = [(user(Medium(0), Text(question)), assistant(f"{index} {question[0]}")) for question in QUESTIONS[: index + 1]]
        if index == 4:
            turns = [(user(Text(question)), assistant("none")) for question in QUESTIONS]
        return Example(f"asked/{index}", ((picture,),) if index != 4 else (), tuple(turns))

    def check(self, conversations: int) -> None: ...


def run_of(cache, *, in_sequence, share_prefix):
    run = tiny_run()
    model, data = run.model, dataclasses.replace(run.data, cache_dir=str(cache), share_prefix=share_prefix, rows=2, tokens=80)
    if in_sequence:
        connector = MlpProjectorConfig(width=model.language.block.width, layers=1)
        positions = AlibiConfig(max_bias=8.0)  # the Flamingo below has rotary ones
        language = dataclasses.replace(model.language, positions=positions, window=30)
        model = dataclasses.replace(model, connector=connector, fusion=InSequenceConfig(), language=language)
        data = dataclasses.replace(data, visual_tokens=4)
    return dataclasses.replace(run, model=model, data=data)


@pytest.mark.parametrize("in_sequence", [True, False], ids=["llava", "flamingo"])
def test_each_sequence_is_predicted_as_alone(tmp_path, in_sequence):
    sums, rows = [], []
    for share_prefix in (False, True):
        config = run_of(tmp_path, in_sequence=in_sequence, share_prefix=share_prefix)
        check_data(config)
        source, processor = Asked(), RecipeProcessor(byte_tokenizer(), config.data)
        model = VisionLanguageModel(config.model)
        params = random_params(model, *model.example())
        of_batch = jax.jit(functools.partial(NextToken(config.objective).sums, model))
        batches = list(eval_batches(config.data, processor, source))
        sums.append(jax.tree.map(lambda *parts: sum(map(float, parts)), *(of_batch(params, batch) for batch in batches)))
        rows.append(sum(int(np.count_nonzero(batch.segments)) for batch in batches))
    apart, shared = sums
    assert apart["sequences"] == 14
    for name, value in apart.items():
        np.testing.assert_allclose(shared[name], value, rtol=1e-5, err_msg=name)
    # <s> and the image stand once for each of the three images that have several questions, and <s> for the text alone.
    prefix = 1 + (4 if in_sequence else 1)
    assert rows[0] - rows[1] == (1 + 2 + 3) * prefix + 3


def test_what_predicts_an_answer_is_not_shared(tmp_path):
    """Captions that begin alike, behind no question: the last visual token predicts, so that it stands in each of them."""
    config = run_of(tmp_path, in_sequence=True, share_prefix=True)

    class Captioned(Asked):
        fingerprint = "captioned"

        def __getitem__(self, index: int) -> Example:
            example = super().__getitem__(0)
            turns = tuple((user(Medium(0)), assistant(caption)) for caption in ("a cat", "a dog"))
            return dataclasses.replace(example, conversations=turns)

    store = tokens_of(config.data, RecipeProcessor(byte_tokenizer(), config.data), Captioned())
    written = store.written(0)
    assert np.all(store.shared == 0)  # one `<image>` of the compact form is not cut
    assert written.tokens[1] == byte_tokenizer().image_id


def test_members_of_a_mixture_share_as_they_do_alone(tmp_path):
    config = run_of(tmp_path, in_sequence=True, share_prefix=True)
    processor = RecipeProcessor(byte_tokenizer(), config.data)
    alone = tokens_of(config.data, processor, Asked()).lengths_to_pack
    mixed = tokens_of(config.data, processor, MixedSource({"asked": Asked()}, {"asked": 1.0}, shares=False)).lengths_to_pack
    np.testing.assert_array_equal(mixed.shared, alone.shared)
    assert set(alone.shared.tolist()) == {0, 1, 5}
    # Once each: the prefixes of the units, and behind them every sequence.
    for lengths in (alone, mixed):
        plan = plan_epoch(lengths, 80, 2)
        assert sorted(plan.sequences.tolist()) == list(range(len(alone.tokens)))


def test_models_that_cannot_share_are_refused(tmp_path):
    config = run_of(tmp_path, in_sequence=True, share_prefix=True)
    prefix_lm = dataclasses.replace(config.model, fusion=InSequenceConfig(prefix_lm=True))
    with pytest.raises(ValueError, match="the images see the question behind them"):
        check_data(dataclasses.replace(config, model=prefix_lm))
    positions = dataclasses.replace(
        tiny_run().model.language.positions, scaling=DynamicNtkScaling(factor=2.0, original_max_positions=8)
    )
    by_length = dataclasses.replace(config.model, language=dataclasses.replace(config.model.language, positions=positions))
    with pytest.raises(ValueError, match="depend on a sequence's length"):
        check_data(dataclasses.replace(config, model=by_length))
