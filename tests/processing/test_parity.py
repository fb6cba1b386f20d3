"""Random conversations, from text and files to ids and pixels: beside transformers' own, for every family and tokenizer."""

import numpy as np
import pytest
from conversations import prompts_of, random_conversation
from references import FAMILIES
from tiny_tokenizers import STYLES

from tests.tiny import thorough
from vlm_jax.interop.published import open_published
from vlm_jax.processing.conversation import from_messages, media_of
from vlm_jax.processing.layout import targets_of
from vlm_jax.processing.pictures import picture_size


def sizes_of(turns, media):
    return [picture_size(media[index][0]) for index in media_of(turns)]


@pytest.mark.parametrize("seeds", [range(25), thorough(range(25, 100))], ids=str)
@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("name", FAMILIES)
def test_equal_to_transformers(name, style, seeds, tmp_path):
    family = FAMILIES[name]
    theirs = family.make(tmp_path / "published", style)
    ours = open_published(tmp_path / "published").processor
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for seed in seeds:
        messages = random_conversation(seed, pictures, system=family.system and seed % 3 == 0, **family.said)
        turns, media = from_messages(messages)
        whole = ours.lay_out(turns, sizes_of(turns, media))
        for prompt in prompts_of(messages):
            asked, own = from_messages(prompt)
            if name == "paligemma" and not own:
                continue  # transformers refuses
            expected = family.reference(theirs, prompt)
            layout = ours.lay_out(asked, sizes_of(asked, own), open=True)
            assert layout.tokens.tolist() == expected.ids, (seed, len(prompt))
            for medium, tiles in zip(own, expected.pixels, strict=True):
                for tile, their_tile in zip(ours.media.pixels(medium), tiles, strict=True):
                    np.testing.assert_array_equal(tile, their_tile)
            if expected.sees is not None:
                seen = np.arange(1, expected.sees.shape[1] + 1) == layout.media_last[:, None]
                np.testing.assert_array_equal(seen, expected.sees)
        # The last prompt, and what training adds to it.
        np.testing.assert_array_equal(whole.tokens[: len(layout.tokens)], layout.tokens)
        for field in ("flags", "visual", "media_last", "media_first"):
            np.testing.assert_array_equal(getattr(whole, field)[: len(layout.tokens)], getattr(layout, field), err_msg=field)
        assert whole.learned[len(layout.tokens) :].all(), "the whole answer and its end"
        check_learned(ours, turns, whole)


def check_learned(processor, turns, layout):
    """What carries loss is every answer and its end token, and nothing else."""
    targets, weights = targets_of(layout, processor.spread.end_id)
    tokenizer = processor.tokenizer
    said, now = [], []
    for target, weight in zip(targets.tolist(), weights, strict=True):
        if weight:
            now.append(target)
            if target in processor.ends:
                said.append(tokenizer.decode(now[:-1]).strip())
                now = []
        else:
            assert not now, "an answer without its end token"
    assert not now
    answers = [turn.text.strip() for turn in turns if turn.role == "assistant"]
    assert said == [tokenizer.decode(tokenizer.encode(answer)).strip() for answer in answers]
