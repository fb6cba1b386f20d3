"""Flamingo's and OpenFlamingo's rules for documents and pairs, by small examples. Tokens are bytes."""

import dataclasses

import numpy as np
import pytest
from data_helpers import (
    byte_tokenizer,
    chat,
    opened,
    parts,
    picture,
    run_config,
    store_of,
    text_of,
    tokenised_with,
    write_lines,
)

from tests.tiny import tiny_run
from vlm_jax.config import DataConfig, JsonLinesConfig
from vlm_jax.data.pipeline import TrainBatches, eval_batches
from vlm_jax.errors import DataError
from vlm_jax.processing.conversation import Medium, Text, Turn, assistant, user
from vlm_jax.training.sets import check_data

replace = dataclasses.replace
text = lambda words, learn=True: Turn("text", (Text(words),), learn=learn)
image = lambda number: Turn("text", (Medium(number),))


def marked(conversation, **changes):
    """The written text, with what is learned in brackets."""
    _, processor = tokenised_with(None, **changes)
    written = processor.write(conversation)
    pieces, learning = "", False
    for token, flag in zip(written.tokens.tolist(), written.flags.tolist(), strict=True):
        if (flag & 1) != learning:
            learning = bool(flag & 1)
            pieces += "[" if learning else "]"
        pieces += byte_tokenizer().decode([token])
    return pieces + ("]" if learning else "")


def test_openflamingos_mask_of_an_interleaved_document():
    """Masked: everything before the first <image>, and between the end of a chunk and the next <image> (MMC4)."""
    document = (text("In"), image(0), text("A"), text("q?", False), text("B"), image(1), text("C"), text("D"))
    everything = "<BOS>[In<EOC>]<image>[A<EOC>]q?[B<EOC>]<image>[CD<EOC>]"
    assert marked(document) == everything
    assert marked(document, learned="after_image") == "<BOS>In<image>[A<EOC>]q?B<image>[CD<EOC>]"
    assert marked((text("In"), text("and")), learned="after_image") == "<BOS>Inand<EOC>"


def test_openflamingos_mask_of_a_pair():
    """Masked: padding and <image> alone (LAION)."""
    pair = (user(Medium(0)), assistant("a cat"))
    assert marked(pair, prompt="{question}", answer="{answer}") == "<BOS><image>[a cat<EOC>]"


def jsonl(folder, records, **changes):
    picture(folder / "a.png")
    path = str(write_lines(folder / "x.jsonl", records))
    plain = dict(prompt="{question}", answer="{answer}", vocab_size=261, image_size=8, rows=2, tokens=64, images=4, workers=0)
    return DataConfig(
        source=JsonLinesConfig(train=path, eval=path), cache_dir=str(folder / "cache"), **plain | changes
    )  # fmt: skip


def test_the_next_image_is_drawn_once_a_document_and_in_training_alone(tmp_path):
    """1.4's golden mask, images at places 2 and 5 of 8 tokens, and its counterpart for the next image."""
    content = [{"text": "A"}, {"image": "a.png"}, {"text": "BC"}, {"image": "a.png"}, {"text": "DE"}]
    data = jsonl(tmp_path, [{"content": [{**part, "learn": False} if "text" in part and index < 3 else part
                                         for index, part in enumerate(content)]}] * 6, next_image=0.5)  # fmt: skip
    processor, source = parts(data)
    last, following = [0, 0, 1, 1, 1, 2, 2, 2], [1, 1, 2, 2, 2, 0, 0, 0]

    def directions(batches):
        found = []
        for batch in batches:
            for row, segments in enumerate(batch.segments):
                for segment in range(1, segments.max() + 1):
                    seen = batch.media_last[row][segments == segment]
                    seen = np.where(seen > 0, seen - batch.media_first[row][segments == segment] + 1, 0).tolist()
                    found.append([last, following].index(seen))
        return found

    read = lambda start=0, seed=0: list(TrainBatches(run_config(data, 12, seed), processor, source, start=start))
    drawn = directions(read())
    assert set(drawn) == {0, 1} and len(drawn) > 40 and abs(np.mean(drawn) - 0.5) < 0.25
    assert drawn[:6] != drawn[6:12]  # another draw in the next epoch
    assert directions(read(start=5)) == drawn[-len(directions(read(start=5))) :]
    assert directions(read(seed=1)) != drawn
    assert set(directions(eval_batches(data, processor, source))) == {0}
    for share in (0.0, 1.0):
        of_share = replace(data, next_image=share)
        assert set(directions(TrainBatches(run_config(of_share), processor, source))) == {int(share)}


def test_half_of_the_pairs_begin_with_a_space(tmp_path):
    records = [chat("<image>", "word", image="a.png")] * 40
    picture(tmp_path / "a.png")
    source = opened(write_lines(tmp_path / "x.jsonl", records))
    plain = dict(prompt="{question}", answer="{answer}")
    texts = lambda **more: [text_of(store, index) for store in [store_of(source, **plain, **more)] for index in range(40)]
    drawn = texts(leading_space=0.5)
    assert set(drawn) == {"<BOS><image>word<EOC>", "<BOS><image> word<EOC>"} and 10 < sum(" " in one for one in drawn) < 30
    assert set(texts()) == {"<BOS><image>word<EOC>"} and set(texts(leading_space=1.0)) == {"<BOS><image> word<EOC>"}


@pytest.mark.parametrize("tiles", [False, True])
def test_documents_are_cut_where_the_row_ends(tmp_path, caplog, tiles):
    """At a token, before a picture that would be one too many, and never within a picture's visual tokens."""
    for number in range(3):
        picture(tmp_path / f"{number}.png", size=(8, 16))  # two tiles of two visual tokens each
    content = [part for number in range(3) for part in ({"image": f"{number}.png"}, {"text": "abcd"})]
    source = opened(write_lines(tmp_path / "x.jsonl", [{"content": content}]))

    def cut(tokens, images):
        store = store_of(source, tiles=tiles, too_long="truncate", tokens=tokens, images=images)
        assert store.lengths[0] <= tokens and store.media[0] == store.example_media[0] and len(store) == 1
        return text_of(store, 0), int(store.media[0])

    slots = 2 if tiles else 1
    assert cut(60, 3 * slots)[1] == 3 and "conversations are cut" not in caplog.text
    assert cut(60, 2 * slots) == ("<BOS><image>abcd<EOC><image>abcd<EOC>", 2) and "1 conversations are cut" in caplog.text
    assert cut(4 if not tiles else 7, 9) == ("<BOS><image>abc", 1)
    if tiles:  # BOS, four visual tokens, five of the text, and the next picture, behind which nothing has room
        assert cut(13, 9) == ("<BOS><image>abcd<EOC>", 1)
    with pytest.raises(DataError, match=r"x\.jsonl:1: nothing is learned of the 1 tokens"):
        cut(1, 9)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(next_image=1.5), r"config\.data\.next_image=1\.5: expected a probability"),
        (dict(leading_space=-0.1), r"config\.data\.leading_space=-0\.1"),
        (dict(processor="x", learned="after_image"), r"config\.data\.learned and leading_space are for recipes"),
    ],
)
def test_a_rule_that_cannot_be_is_named(changes, message):
    run = tiny_run()
    with pytest.raises(ValueError, match=message):
        check_data(replace(run, data=replace(run.data, **changes)))
