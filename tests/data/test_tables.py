"""Tables as sources: tensorflow-datasets by name, Hugging Face `datasets`, and the names of their fields."""

import io
import pickle
import sys

import numpy as np
import pytest
from data_helpers import parts, picture, run_config
from PIL import Image

from vlm_jax.config import DataConfig, FieldsConfig, HuggingFaceConfig, TfdsConfig
from vlm_jax.data.fields import example_of
from vlm_jax.data.pipeline import TrainBatches, build_source
from vlm_jax.errors import DataError, RecordError
from vlm_jax.processing.conversation import plain_text
from vlm_jax.processing.pictures import read_image

DATA = dict(vocab_size=300, image_size=8, rows=2, tokens=120, images=4, workers=0)


def png(grey, kind="PNG"):
    out = io.BytesIO()
    Image.new("RGB", (8, 8), (grey,) * 3).save(out, kind)
    return out.getvalue()


def texts(example):
    return [plain_text(conversation) for conversation in example.conversations]


def greys(example):
    return [int(read_image(frame).mean()) for (frame,) in example.media]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """Tiny sets of coco_captions' and clevr's features, prepared as tfds does it."""
    import tensorflow_datasets as tfds

    folder = tmp_path_factory.mktemp("tfds")
    features = tfds.features
    of_set = {
        "coco_captions": {
            "image": features.Image(encoding_format="jpeg"),
            "image/filename": features.Text(),
            "image/id": np.int64,
            "captions": features.Sequence({"id": np.int64, "text": features.Text()}),
        },
        "clevr": {
            "image": features.Image(),
            "file_name": features.Text(),
            "question_answer": features.Sequence({"question": features.Text(), "answer": features.Text()}),
        },
    }

    def record(name, number):
        grey = io.BytesIO(png(10 * number + 10, {"clevr": "PNG"}.get(name, "JPEG")))
        if name == "clevr":
            pairs = [{"question": f"How many {number}?", "answer": "one"}, {"question": "Red?", "answer": "no"}]
            return {"image": grey, "file_name": "x.png", "question_answer": pairs}
        captions = [{"id": 1, "text": f"A dog {number}."}, {"id": 2, "text": f"An animal {number}."}]
        return {"image": grey, "image/filename": "x.jpg", "image/id": number, "captions": captions}

    def build(name, held_out, version="1.0.0"):
        class Tiny(tfds.core.GeneratorBasedBuilder):
            VERSION = tfds.core.Version(version)
            code_path = None

            def _info(self):
                return tfds.core.DatasetInfo(builder=self, features=features.FeaturesDict(of_set[name]))

            def _split_generators(self, dl_manager):
                return {split: ((n, record(name, n)) for n in range(3)) for split in ("train", held_out)}

            def _generate_examples(self):
                raise NotImplementedError

        Tiny.name = name
        Tiny(data_dir=str(folder), file_format="array_record").download_and_prepare()

    tfds.disable_progress_bar()
    with tfds.core.registered.skip_registration():
        build("coco_captions", "val")
        build("clevr", "validation")
        build("clevr", "validation", version="1.10.0")
    return folder


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("coco_captions", ["A dog 1.", "An animal 1."]),
        ("clevr", ["How many 1? one", "Red? no"]),
    ],
)
def test_tfds_by_name(prepared, tmp_path, name, expected):
    config = DataConfig(source=TfdsConfig(name=name, data_dir=str(prepared)), cache_dir=str(tmp_path), **DATA)
    source = build_source(config, "train")
    read = {tuple(texts(source[index])): greys(source[index])[0] for index in range(3)}
    assert abs(read[tuple(expected)] - 20) <= 1 and len(read) == 3
    assert isinstance(source[0].media[0][0], bytes)  # not decoded yet
    held_out = build_source(config, "eval")
    assert len(held_out) == 3 and held_out.fingerprint != source.fingerprint
    processor, _ = parts(config)
    batches = list(TrainBatches(run_config(config, 3), processor, pickle.loads(pickle.dumps(source))))
    assert len(batches) == 3 and batches[0].frames.any() and "tensorflow" not in sys.modules


def test_tfds_says_what_is_missing(prepared):
    open_set = lambda **more: build_source(DataConfig(source=TfdsConfig(data_dir=str(prepared), **more), **DATA), "train")
    with pytest.raises(DataError, match=r"holds no prepared set.*\n?.*tfds build vqa --file_format=array_record"):
        open_set(name="vqa", fields=FieldsConfig(answer="x"))
    with pytest.raises(ValueError, match=r"data\.source\.fields: name the field of the answers"):
        open_set(name="vqa")
    with pytest.raises(DataError, match=r"clevr/1\.10\.0: has the splits train, validation; expected dev"):
        open_set(name="clevr", train="dev")
    with pytest.raises(DataError, match=r"train/0: has no field 'captions/words'; there is id, text"):
        open_set(name="coco_captions", fields=FieldsConfig(answer="captions/words"))[0]
    assert len(open_set(name="clevr", train="train[:2]")) == 2


@pytest.fixture
def parquet(tmp_path):
    """Questions with pictures as `datasets` writes them, and chats."""
    pytest.importorskip("datasets")
    import pyarrow as pa
    import pyarrow.parquet as pq

    picture(tmp_path / "file.png", (70,) * 3)
    image = lambda n: {"bytes": png(10 * n + 10), "path": None} if n else {"bytes": None, "path": str(tmp_path / "file.png")}
    table = {
        "image": [image(n) for n in range(4)],
        "question": [f"q{n}" for n in range(4)],
        "answers": [[f"a{n}", "b"] for n in range(4)],
        "turns": [[{"from": "human", "value": f"<image>\nq{n}", "x": None}, {"from": "gpt", "value": "a", "x": None}]
                  for n in range(4)],
    }  # fmt: skip
    for split, rows in {"train-0": slice(0, 2), "train-1": slice(2, 4), "validation": slice(0, 1)}.items():
        pq.write_table(pa.table({name: values[rows] for name, values in table.items()}), tmp_path / f"{split}.parquet")
    return tmp_path


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        (FieldsConfig(question="question", answer="answers"), ["q3 a3", "q3 b"]),
        (FieldsConfig(answer="question"), ["q3"]),
        (FieldsConfig(conversation="turns"), ["q3 a"]),
        (FieldsConfig(image="", answer="question"), ["q3"]),
    ],
)
def test_local_parquet(parquet, fields, expected):
    config = DataConfig(source=HuggingFaceConfig(name=str(parquet), fields=fields), cache_dir=str(parquet / "c"), **DATA)
    source = build_source(config, "train")
    assert texts(source[3]) == expected and len(source) == 4 and len(build_source(config, "eval")) == 1
    assert [greys(source[index]) for index in (0, 3)] == ([[70], [40]] if fields.image else [[], []])
    processor, _ = parts(config)
    assert len(list(TrainBatches(run_config(config, 3), processor, pickle.loads(pickle.dumps(source))))) == 3


def test_a_stream_is_kept(parquet, monkeypatch):
    """Its first rows, pictures undecoded, fetched once; the same files read another time are the same data."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", parquet / "kept")
    fields = FieldsConfig(question="question", answer="answers")
    opened = lambda **more: build_source(
        DataConfig(source=HuggingFaceConfig(name=str(parquet), fields=fields, **more), cache_dir=str(parquet / "c"), **DATA),
        "train",
    )
    source = opened(stream=3)
    assert len(source) == 3 and [(texts(source[n]), greys(source[n])) for n in range(3)] == [
        ([f"q{n} a{n}", f"q{n} b"], [(70, 20, 30)[n]]) for n in range(3)
    ]
    with monkeypatch.context() as patch:  # it is on disk
        patch.setattr(datasets.IterableDataset, "__iter__", None)
        assert opened(stream=3).fingerprint == source.fingerprint
        assert texts(pickle.loads(pickle.dumps(source))[2]) == texts(source[2])
        with pytest.raises(DataError, match="stream"):
            opened(stream=2)
    assert len(opened(stream=9)) == 4
    with pytest.raises(DataError, match=r"'train\[:2\]' is a part"):
        opened(stream=3, train="train[:2]")


def test_hugging_face_says_what_is_missing(parquet, monkeypatch):
    fields = FieldsConfig(answer="question")
    open_set = lambda **more: build_source(
        DataConfig(source=HuggingFaceConfig(**dict(name=str(parquet), fields=fields) | more), **DATA), "train"
    )
    with pytest.raises(DataError, match=r"holds no dev\*\.parquet"):
        open_set(train="dev")
    with pytest.raises(DataError, match=r"train/0: has no field 'caption'; there is image, question, answers, turns"):
        open_set(fields=FieldsConfig(answer="caption"))[0]
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match=r"pip install 'vlm_jax\[datasets\]'"):
        open_set()


def test_fields_of_a_record():
    record = {"image": [png(1), png(2)], "qa": [{"q": "one", "a": b"1"}, {"q": "two", "a": b"2"}], "n": 3, "none": None}
    example = example_of("x", record, FieldsConfig(question="qa/q", answer="qa/a"))
    assert texts(example) == ["one 1", "two 2"] and greys(example) == [1, 2]
    assert greys(example_of("x", record, FieldsConfig(image="none", answer="qa/a"))) == []
    for fields, message in {
        FieldsConfig(answer="qa/b"): "has no field 'qa/b'; there is q, a",
        FieldsConfig(image="n", answer="qa/a"): "a picture is 3; expected its bytes",
        FieldsConfig(conversation="n", image=""): "its turns are 3; expected a list of objects",
    }.items():
        with pytest.raises(RecordError, match=message):
            example_of("x", record, fields)
