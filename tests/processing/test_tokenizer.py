import subprocess
import sys

import pytest

from vlm_jax.processing.tokenizer import SPECIAL, Tokenizer, TokenizerError, load_tokenizer, train_tokenizer

TEXTS = ["what color is the shape?", " red", " no", "is there a circle in the image?"] * 4
TYPED = [
    "a cat\n",
    "  two spaces",
    "Zürich 猫 🙂👩‍👩‍👧",
    "<image>",
    "a <EOC> b</s><pad>",
    "",
    "\x00\x7f",
    "naïve   ",
    "don't .",
]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(TEXTS, 300)


@pytest.mark.parametrize("text", TYPED)
def test_round_trip(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert not set(ids) & set(range(5))  # no special token comes of what is typed


def test_special_tokens(tokenizer):
    assert tokenizer.pad_id == 0
    ids = [tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id, tokenizer.image_id, tokenizer.eoc_id]
    assert ids == [0, 1, 2, 3, 4]
    assert not {3, 4} & set(tokenizer.encode("<image>a<EOC>"))  # written out, they are text
    assert tokenizer.decode([1, 3, *tokenizer.encode(" red"), 4]) == "<BOS><image> red<EOC>"
    assert tokenizer.decode([1, 3, *tokenizer.encode(" red"), 4], special=False) == " red"


@pytest.mark.parametrize("text", [text for text in TYPED if text.isascii()] + TEXTS[:4])
def test_offsets_are_the_characters_of_each_token(tokenizer, text):
    ids, offsets = tokenizer.encode_offsets(text)
    assert ids == tokenizer.encode(text)
    assert [text[begin:end] for begin, end in offsets] == [tokenizer.decode([token]) for token in ids]


def test_offsets_count_characters_and_not_bytes(tokenizer):
    ids, offsets = tokenizer.encode_offsets("猫 red")
    assert tokenizer.decode(ids[-1:]) == " red" and offsets[-1] == (1, 5)
    assert offsets[:-1] == [(0, 1)] * (len(ids) - 1) and len(ids) == 4  # each of its three bytes is of the first


def test_training_is_the_same_in_another_process(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "here")
    code = (
        "import sys; from vlm_jax.processing.tokenizer import train_tokenizer;"
        f"train_tokenizer({TEXTS!r}, 300).save(sys.argv[1]);"
        "assert 'torch' not in sys.modules and 'tensorflow' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "there")], check=True)
    assert (tmp_path / "here/tokenizer.json").read_bytes() == (tmp_path / "there/tokenizer.json").read_bytes()


def test_saved_and_loaded(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert not list(tmp_path.glob(".*"))
    assert vars_of(loaded) == vars_of(tokenizer)
    for text in TYPED:
        assert loaded.encode(text) == tokenizer.encode(text)
        assert loaded.encode_offsets(text) == tokenizer.encode_offsets(text)
    assert loaded.serialised == tokenizer.serialised != train_tokenizer(TEXTS, 270).serialised


def vars_of(tokenizer: Tokenizer) -> dict:
    return {name: value for name, value in vars(tokenizer).items() if not name.startswith("_")}


def test_pickle(tokenizer):
    import pickle

    again = pickle.loads(pickle.dumps(tokenizer))
    assert vars_of(again) == vars_of(tokenizer) and again.encode("<image> red") == tokenizer.encode("<image> red")


def test_a_published_tokenizer_gets_what_it_lacks(tmp_path):
    from tokenizers import Tokenizer as Fast
    from tokenizers import decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab = {token: index for index, token in enumerate(["<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    fast = Fast(models.BPE(vocab, []))
    fast.pre_tokenizer, fast.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=fast, bos_token="<s>", eos_token="</s>").save_pretrained(tmp_path)
    got = load_tokenizer(tmp_path)
    assert (got.bos_id, got.eos_id) == (0, 1)
    assert sorted([got.pad_id, got.image_id, got.eoc_id]) == [258, 259, 260] and got.vocab_size == 261
    got.save(tmp_path / "more")
    assert vars_of(load_tokenizer(tmp_path / "more")) == vars_of(got)


def test_refused(tmp_path):
    with pytest.raises(TokenizerError, match=r"vocab_size=200.* at least 261"):
        train_tokenizer(TEXTS, 200)
    with pytest.raises(TokenizerError, match=r"no tokenizer\.json"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(TokenizerError, match=str(tmp_path)):
        load_tokenizer(tmp_path)
    with pytest.raises(TokenizerError, match="no/where"):
        load_tokenizer("no/where")
    assert len(SPECIAL) == 5
