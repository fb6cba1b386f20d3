"""Pairs of a chosen and a rejected answer: from the forms in which they are published to the rows of a batch."""

import base64
import json

import numpy as np
import pytest
from data_helpers import opened, picture, processor_of, store_of, text_of, write_lines

from vlm_jax.config import DataConfig, JsonLinesConfig
from vlm_jax.data.packing import Lengths, plan_epoch
from vlm_jax.data.pipeline import build_source, eval_batches
from vlm_jax.data.sources.easy_vqa_pairs import KINDS, wrong_answer
from vlm_jax.errors import DataError
from vlm_jax.processing.conversation import Medium, Text, Turn, assistant, user

SAY = lambda text: [{"role": "assistant", "content": text}]
ASKED = (user(Medium(0), Text("What is this?")),)
PICTURED = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is this?"}]}]
PAIR = {"question": "What is this?", "chosen": "A cat.", "rejected": "A dog."}
OUTPUTS = {"output_1": {"from": "llava", "value": "A dog."}, "output_2": {"from": "llava", "value": "A cat."}}
HUMAN = {"from": "human", "value": "What is this?\n<image>"}
RECORDS = {
    "RLHF-V": {"image": "a.png"} | PAIR,
    "RLHF-V-Dataset": {
        "ds_name": "RLHF-V",
        "image": "a.png",
        "text": json.dumps(PAIR),
        "origin_dataset": "coco",
        "origin_split": json.dumps({"model": "Muffin"}),
        "idx": "7",
        "image_path": "coco/a.png",
    },
    "RLAIF-V": {"image": "a.png", "image_path": "x/a.png", "ds_name": "RLAIF-V", "idx": 3} | PAIR,
    "LLaVA-RLHF": {"id": "9", "image": "a.png", "conversations": [HUMAN], "preference": 2, "hallucination": True} | OUTPUTS,
    "LLaVA-RLHF, answered": {
        "image": "a.png",
        "conversations": [[HUMAN, {"from": "gpt", "value": "neither"}]],
        "preference": 2,
    }
    | OUTPUTS,
    "TRL": {"images": ["a.png"], "prompt": PICTURED, "chosen": SAY("A cat."), "rejected": SAY("A dog.")},
    "TRL, the prompt in both": {"image": "a.png", "chosen": PICTURED + SAY("A cat."), "rejected": PICTURED + SAY("A dog.")},
    "TRL, no place for the picture": {
        "images": ["a.png"],
        "prompt": [{"role": "user", "content": "What is this?"}],
        "chosen": SAY("A cat."),
        "rejected": SAY("A dog."),
    },
}


def first_of(folder, record):
    picture(folder / "a.png")
    return opened(write_lines(folder / "x.jsonl", [record]))[0]


@pytest.mark.parametrize("form", RECORDS)
def test_the_published_forms_are_read_unchanged(tmp_path, form):
    example = first_of(tmp_path, RECORDS[form])
    assert example.pairs and example.media == ((str(tmp_path / "a.png"),),)
    assert example.conversations == ((*ASKED, assistant("A cat.")), (*ASKED, assistant("A dog.")))


def test_bytes_of_a_picture_in_base64(tmp_path):
    path = picture(tmp_path / "b.png", (1, 2, 3))
    held = {"bytes": base64.b64encode(path.read_bytes()).decode(), "path": "b.png"}
    assert first_of(tmp_path, PAIR | {"image": held}).media == ((path.read_bytes(),),)
    assert first_of(tmp_path, PAIR | {"image": {"bytes": None, "path": "b.png"}}).media == ((str(path),),)
    with pytest.raises(DataError, match="a picture's 'bytes' are 'no base64!'; expected base64"):
        first_of(tmp_path, PAIR | {"image": {"bytes": "no base64!", "path": None}})


def test_only_the_last_answer_is_learned(tmp_path):
    turns = [HUMAN, {"from": "gpt", "value": "An animal."}, {"from": "human", "value": "Which?"}]
    example = first_of(tmp_path, {"image": "a.png", "conversations": turns, "preference": 1} | OUTPUTS)
    before = (*ASKED, Turn("assistant", (Text("An animal."),)), user(Text("Which?")))
    assert example.conversations == ((*before, assistant("A dog.")), (*before, assistant("A cat.")))


@pytest.mark.parametrize(
    ("record", "said"),
    [
        ({"question": "Q", "chosen": "A"}, "has no 'rejected'; expected 'chosen' and 'rejected'"),
        ({"chosen": "A", "rejected": "B"}, "has texts under 'chosen' and 'rejected', and no 'question' or 'prompt'"),
        ({"conversations": [HUMAN], "preference": 0} | OUTPUTS, "'preference' is 0; expected 1 or 2, the preferred output"),
        ({"conversations": [HUMAN], "preference": 1, "output_1": {"value": "A"}}, "'output_2' is None; expected an object"),
        ({"image": "a.png", "text": "{}"}, "'text' is '{}'; expected a JSON object with 'question', 'chosen' and 'rejected'"),
        ({"prompt": PICTURED, "chosen": SAY("A"), "rejected": "B"}, "expected lists of messages under 'rejected' and 'prompt'"),
        ({"chosen": PICTURED + SAY("A"), "rejected": SAY("B")}, "differ before their last message; expected the same prompt"),
        ({"prompt": PICTURED, "chosen": PICTURED, "rejected": PICTURED}, "the last message of 'chosen' is not the assistant's"),
        ({"image": "a.png", "question": ["Q"], "chosen": "A", "rejected": "B"}, r"'value' is \[\"Q\"\]; expected a string"),
    ],
)
def test_a_wrong_pair_is_named(tmp_path, record, said):
    with pytest.raises(DataError, match=f"x.jsonl:1: .*{said}"):
        first_of(tmp_path, record)


# ---------------------------------------------------------------------------------------------------------------------
# Rows
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("per_image", [0, 2])
def test_a_pair_is_never_in_two_rows(shuffle, per_image):
    rng = np.random.default_rng(0)
    example = np.repeat(np.arange(100), 2 * rng.integers(1, 6, 100))
    share = np.where(rng.random(len(example)) < 0.3, 0.5, 1.0).astype(np.float32) if shuffle else None
    tokens = rng.integers(1, 15, len(example)).astype(np.int32)
    plan = plan_epoch(
        Lengths(tokens, example, np.ones(100, np.int64), share, together=2), 30, 3, per_image, 5, 2, shuffle=shuffle
    )
    seen = []
    for row in range(len(plan)):
        units = plan[row]
        assert sum(tokens[unit].sum() for unit in units) <= 30 and len(units) <= 3
        for unit in units:
            assert len(set(example[unit])) == 1 and (not per_image or len(unit) <= 2 * per_image)
            assert unit[::2].tolist() == (unit[1::2] - 1).tolist() and not np.any(unit[::2] % 2), "chosen, then rejected"
            seen += unit.tolist()
    assert len(set(seen)) == len(seen)
    certain = np.arange(len(example)) if share is None else np.repeat(np.flatnonzero(share[::2] == 1) * 2, 2)
    assert set(certain.tolist()) <= set(seen) and (share is None or len(seen) < len(example))


def pairs(folder, *records, **changes):
    for name in "abc":
        picture(folder / f"{name}.png")
    source = opened(write_lines(folder / "x.jsonl", list(records)))
    return source, store_of(source, pairs=True, **changes)


def short(name, **changes):
    return {"image": f"{name}.png", "question": name, "chosen": "Yes", "rejected": "No, no"} | changes


@pytest.mark.parametrize("tiles", [False, True])
def test_both_answers_see_one_slot_and_the_batch_says_which_is_chosen(tmp_path, tiles):
    """Tiled pictures are a tile of two visual tokens here, which each answer's prompt has."""
    data = DataConfig(
        source=JsonLinesConfig(train=str(tmp_path / "x.jsonl"), eval=str(tmp_path / "x.jsonl")),
        tokenizer="train",
        vocab_size=300,
        pairs=True,
        image_size=8,
        rows=1,
        tokens=200,
        images=3,
        visual_tokens=2 * tiles,
        cache_dir=str(tmp_path / "cache"),
    )
    write_lines(tmp_path / "x.jsonl", [short(name) for name in "abc"])
    for value, name in enumerate("abc", 1):
        picture(tmp_path / f"{name}.png", (value,) * 3)
    source = build_source(data, "train")
    processor = processor_of(data, source)
    (batch,) = eval_batches(data, processor, source)
    assert batch.images[0, :, 0, 0, 0, 0].tolist() == [1, 2, 3], "three pictures for six conversations"
    decode = lambda here: processor.tokenizer.decode(batch.targets[0, here & (batch.weights[0] > 0)].tolist())
    for pair in (1, 2, 3):
        chosen, rejected = (batch.preference[0] == sign * pair for sign in (1, -1))
        assert set(batch.segments[0, chosen]) == {2 * pair - 1} and set(batch.segments[0, rejected]) == {2 * pair}
        assert "Yes" in decode(chosen) and "No, no" in decode(rejected)
        for half in (chosen, rejected):
            assert set(batch.media_last[0, half].tolist()) - {0} == {pair}
            if tiles:
                assert sorted(set(batch.visual[0, half].tolist()) - {0}) == [2 * pair - 1, 2 * pair]
    assert not np.any(batch.preference[0, batch.segments[0] == 0])


def test_a_pair_that_is_too_long_is_an_error_or_left_out_as_a_whole(tmp_path):
    """No half is cut: the answers of 3 and 6 bytes do not change which pairs fit, only both together do."""
    long = short("b", rejected="No" * 20)
    with pytest.raises(DataError, match=r"x\.jsonl:2: a chosen and a rejected answer of \d+ and \d+ tokens.*data\.tokens=80"):
        pairs(tmp_path, short("a"), long, short("c"), tokens=80)
    _, store = pairs(tmp_path, short("a"), long, short("c"), tokens=80, too_long="drop_turns")
    assert store.example.tolist() == [0, 0, 2, 2] and store.meta["dropped"] == 4
    assert ["Yes" in text_of(store, index) for index in range(4)] == [True, False, True, False]
    assert store.slots.tolist() == [1, 0, 1]
    # With the prompt in the row once the long pair fits; a longer one does not, and is left out.
    _, store = pairs(tmp_path, short("a"), long, tokens=80, share_prefix=True)
    assert len(store) == 4 and store.shared[2] == store.shared[3] > 0
    _, store = pairs(tmp_path, short("a"), short("b", rejected="No" * 40), tokens=80, share_prefix=True, too_long="drop_turns")
    assert store.example.tolist() == [0, 0]


def test_pairs_and_other_data_are_not_mixed_up(tmp_path):
    plain = {"image": "a.png", "conversations": [HUMAN, {"from": "gpt", "value": "A"}]}
    with pytest.raises(DataError, match=r"x\.jsonl:2: has no chosen and rejected answer, and data\.pairs=True: set config"):
        pairs(tmp_path, short("a"), plain)
    with pytest.raises(DataError, match=r"y\.jsonl:1: is a pair .* and data\.pairs=False: set config\.data\.pairs=True"):
        store_of(opened(write_lines(tmp_path / "y.jsonl", [short("a")])))


# ---------------------------------------------------------------------------------------------------------------------
# easy-VQA
# ---------------------------------------------------------------------------------------------------------------------


def test_a_wrong_answer_is_another_one_of_its_kind():
    assert wrong_answer("yes", 1) == "no" and wrong_answer("no", 2) == "yes"
    for kind in KINDS[1:]:
        for right in kind:
            others = {wrong_answer(right, seed) for seed in range(60)}
            assert others == set(kind) - {right}
