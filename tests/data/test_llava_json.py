"""LLaVA's files read as they were published: LCS-558K and mix665k, with what is odd in them."""

import json

import pytest
from data_helpers import opened, picture, store_of, text_of

from vlm_jax.errors import DataError
from vlm_jax.processing.conversation import Medium, Text, user

turns = lambda *values: [
    {"from": ("human", "gpt")[number % 2], "value": value} for number, value in enumerate(values)
]  # fmt: skip
LCS = [
    {
        "id": "004539375",
        "image": "00453/004539375.jpg",
        "conversations": turns("Render a clear and concise summary of the photo.\n<image>", "select luxury furniture"),
    },
    {"id": "002239345", "image": "00223/002239345.jpg", "conversations": turns("<image>\nWrite a terse summary.", "a path")},
]
MIX = [
    {
        "id": "000000033471",
        "image": "coco/train2017/000000033471.jpg",
        "conversations": turns("<image>\nWhat are the colors of the bus?", "White and red.", "Where?", "On the back."),
    },
    {"id": 2353712, "image": "vg/VG_100K_2/2353712.jpg", "conversations": turns("<image>\nRegion: [0.2, 0.1]?", "A wall.")},
    {"id": "n1", "image": "gqa/images/2405722.jpg", "conversations": turns("What is it?\nOne word.\n<image>", "Cup")},
    {"id": "1", "image": "ocr_vqa/images/1501124531.jpg", "conversations": turns("<image>\nWho wrote this?", "Stan Lee")},
    {
        "id": "2",
        "image": "textvqa/train_images/0a1.jpg",
        "conversations": turns("<image>\nReference OCR token: A\nBrand?", "A"),
    },
    {"id": "wNBG8Gp_0", "model": "", "conversations": turns("Write a function.", "def f(): ...", "Thanks", "Welcome")},
    {
        "id": "SfwFbzN_12",
        "conversations": [{"from": "gpt", "value": "(the end of an answer)"}, *turns("And then?", "Then this.")],
    },
    {"id": "3", "image": "vg/VG_100K/1.jpg", "conversations": turns("<image>\nLost?", "Yes")},  # not among the pictures
]


@pytest.fixture
def root(tmp_path):
    for record in (*LCS, *MIX[:-1]):
        if "image" in record:
            path = tmp_path / record["image"]
            path.parent.mkdir(parents=True, exist_ok=True)
            picture(path)
    return tmp_path


def source(root, name, records):
    (root / name).write_text(json.dumps(records))
    return opened(root / name)


def test_lcs_558k(root):
    read = source(root, "blip_laion_cc_sbu_558k.json", LCS)
    asked = [read[index].conversations[0][0] for index in range(2)]
    # Before or after the text, it means the same.
    assert asked == [user(Medium(0), Text(words)) for words in ("Render a clear and concise summary of the photo.",
                                                                "Write a terse summary.")]  # fmt: skip
    assert read[0].media == ((str(root / "00453/004539375.jpg"),),)
    store = store_of(read, prompt="{question}", answer="{answer}")
    assert text_of(store, 1) == "<BOS><image>Write a terse summary.a path<EOC>"


def test_mix665k(root, caplog):
    read = source(root, "llava_v1_5_mix665k.json", MIX)
    with pytest.raises(DataError, match=r"mix665k\.json:\d+: picture .*vg/VG_100K/1\.jpg: there is no such file"):
        store_of(read, prompt="{question}|", answer="{answer}|")
    store = store_of(read, skip=True, prompt="{question}|", answer="{answer}|")
    assert store.meta["problems"] == 1 and "1 of 8 examples are left out" in caplog.text
    assert [text_of(store, index) for index in range(len(store))] == [
        "<BOS><image>What are the colors of the bus?|White and red.|<EOC>Where?|On the back.|<EOC>",
        "<BOS><image>Region: [0.2, 0.1]?|A wall.|<EOC>",
        "<BOS><image>What is it?\nOne word.|Cup|<EOC>",
        "<BOS><image>Who wrote this?|Stan Lee|<EOC>",
        "<BOS><image>Reference OCR token: A\nBrand?|A|<EOC>",
        "<BOS>Write a function.|def f(): ...|<EOC>Thanks|Welcome|<EOC>",
        "<BOS>And then?|Then this.|<EOC>",
    ]
    assert store.media.tolist() == [1, 1, 1, 1, 1, 0, 0]
