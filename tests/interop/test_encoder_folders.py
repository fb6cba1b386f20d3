"""Folders of CLIP, SigLIP and image encoders as transformers saves them: read, used, and written again."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from folders import exported_again, load, picture
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch_helpers import compare, randomised
from transformers import (
    Blip2VisionConfig,
    Blip2VisionModel,
    BlipImageProcessorPil,
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    CLIPVisionModelWithProjection,
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    PreTrainedTokenizerFast,
    SiglipConfig,
    SiglipImageProcessorPil,
    SiglipModel,
    SiglipProcessor,
    SiglipVisionConfig,
    SiglipVisionModel,
)

sys.path.insert(0, str(Path(__file__).parents[2]))
import infer
from vlm_jax.encoders import Encoder
from vlm_jax.errors import RequestError
from vlm_jax.families import open_clip
from vlm_jax.interop.engine import to_published

SIZES = dict(hidden_size=24, num_hidden_layers=2, num_attention_heads=3, image_size=16, patch_size=4)
VISION = SIZES | dict(intermediate_size=40)
WORDS = ["<unk>", "<pad>", "<bos>", "a", "photo", "<end>", "of", ".", "cat", "dog", "it", "is", "red", "bicycle"]
TEXT = dict(
    hidden_size=24,
    intermediate_size=40,
    num_hidden_layers=2,
    num_attention_heads=2,
    vocab_size=len(WORDS),
    max_position_embeddings=12,
    pad_token_id=1,
    bos_token_id=2,
    eos_token_id=5,
)
NAMES = ["cat", "dog", "red bicycle"]


def word_tokenizer() -> PreTrainedTokenizerFast:
    """A token a word, and the end token behind each text."""
    backend = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing(single="$A <end>", special_tokens=[("<end>", 5)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", pad_token="<pad>", eos_token="<end>")


def two_towers(folder: Path, family: str):
    if family == "clip":
        config = CLIPConfig(vision_config=VISION, text_config=TEXT, projection_dim=17)
        model = randomised(CLIPModel(config))
        images = CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
        processor = CLIPProcessor(images, word_tokenizer())
    else:
        model = randomised(SiglipModel(SiglipConfig(vision_config=VISION, text_config=TEXT | dict(projection_size=24))))
        processor = SiglipProcessor(SiglipImageProcessorPil(size={"height": 16, "width": 16}), word_tokenizer())
        model.logit_bias.data.fill_(2.0)  # so that the sigmoid does not saturate
    model.logit_scale.data.fill_(3.3)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return model, processor


def pictures() -> list:
    return [picture(seed, height, width) for seed, (height, width) in enumerate([(20, 30), (40, 17), (16, 16)])]


@pytest.mark.parametrize("family", ["clip", "siglip"])
@pytest.mark.parametrize("template", ["a photo of a {}.", "it is {}"])
def test_zero_shot_classification(tmp_path, family, template):
    model, processor = two_towers(tmp_path, family)
    encoder = load(tmp_path, rows=2)
    assert isinstance(encoder, Encoder)
    texts = [template.replace("{}", name) for name in NAMES]
    inputs = processor(images=pictures(), text=texts, padding="max_length", max_length=12, return_tensors="pt")
    with torch.no_grad():
        theirs = model(input_ids=inputs["input_ids"], pixel_values=inputs["pixel_values"])
        features = model.vision_model(inputs["pixel_values"]).last_hidden_state
    ours = encoder.classify(pictures(), NAMES, template)
    expected = theirs.logits_per_image.softmax(1) if family == "clip" else theirs.logits_per_image.sigmoid()
    np.testing.assert_allclose(ours, expected, atol=1e-5)
    assert ours.shape == (3, 3) and np.ptp(ours) > 0.05
    assert np.allclose(ours.sum(1), 1) == (family == "clip")
    scale = theirs.image_embeds.shape[1] ** 0.5  # so that a value is about 1
    compare(encoder.embed_images(pictures()) * scale, theirs.image_embeds * scale)
    compare(encoder.embed_texts(texts) * scale, theirs.text_embeds * scale)
    if family == "siglip":
        compare(encoder.features(pictures()), features)


@pytest.mark.parametrize("family", ["clip", "siglip"])
def test_a_mesh_and_the_way_back(tmp_path, family):
    model = two_towers(tmp_path / "theirs", family)[0]
    alone, spread = (load(tmp_path / "theirs", mesh).classify(pictures(), NAMES) for mesh in (None, "data=2,fsdp=2,tensor=2"))
    np.testing.assert_allclose(spread, alone, atol=1e-5)
    again = exported_again(load(tmp_path / "theirs"), tmp_path / "theirs", type(model), tmp_path / "ours")
    for (name, one), other in zip(model.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(one, other), name


def test_open_clips_names_are_read(tmp_path):
    two_towers(tmp_path, "clip")
    encoder = load(tmp_path)
    expected = encoder.classify(pictures(), NAMES)
    (tmp_path / "model.safetensors").unlink()
    file = tmp_path / "open_clip_model.safetensors"
    save_file(to_published(encoder.params, open_clip.table(encoder.checkpoint.config)), file)
    assert "visual.proj" in load_file(file)
    np.testing.assert_array_equal(load(tmp_path).classify(pictures(), NAMES), expected)
    # A file of neither spelling is told against the one it is nearest to.
    state = load_file(file)
    del state["visual.ln_pre.weight"]
    save_file(state, file)
    with pytest.raises(ValueError, match=r"(?s)do not have.*visual\.ln_pre\.weight"):
        load(tmp_path)


def test_two_towers_without_an_embedding_of_the_image_are_refused(tmp_path):
    """transformers' own model cannot compare them either."""
    two_towers(tmp_path, "siglip")
    file = tmp_path / "config.json"
    config = json.loads(file.read_text())
    config["vision_config"]["vision_use_head"] = False
    file.write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"vision_use_head=False \(only True is implemented\)"):
        load(tmp_path)


def test_lists_are_lists(tmp_path):
    two_towers(tmp_path, "clip")
    encoder = load(tmp_path)
    for call in (
        lambda: encoder.classify(pictures(), "cat"),
        lambda: encoder.embed_texts("cat"),
        lambda: encoder.embed_images("a.png"),
    ):
        with pytest.raises(RequestError, match="expected a list; put it in brackets"):
            call()
    with pytest.raises(RequestError, match="images: the list is empty"):
        encoder.features([])


def test_a_folder_without_its_tokenizer_is_refused(tmp_path):
    """transformers makes an empty tokenizer of it, whose answers mean nothing."""
    two_towers(tmp_path, "clip")
    for file in tmp_path.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(ValueError, match=r"holds no tokenizer: expected one of .*tokenizer\.json.*; fetch it again"):
        load(tmp_path)


def test_infer_says_which_name_fits(tmp_path, capsys):
    two_towers(tmp_path, "clip")
    files = [str(tmp_path / f"{number}.png") for number in range(3)]
    for file, image in zip(files, pictures(), strict=True):
        image.save(file)
    chances = load(tmp_path).classify(pictures(), NAMES)
    command = [f"--checkpoint={tmp_path}", "--classes=cat,dog, red bicycle", *(f"--image={file}" for file in files)]
    capsys.readouterr()
    assert infer.main(command) == 0
    expected = ""
    for file, row in zip(files, chances, strict=True):
        order = np.argsort(-row)
        expected += f"{file}\n" + "".join(f"{row[place]:7.2%}  {NAMES[place]}\n" for place in order)
    assert capsys.readouterr().out == expected
    assert infer.main([f"--checkpoint={tmp_path}", f"--image={files[0]}", "--prompt=what is it?"]) == 2
    assert "is an image-text encoder: use --classes" in capsys.readouterr().err


PICTURES = CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
ALONE = {
    "clip": (CLIPVisionModel, CLIPVisionConfig(**VISION), PICTURES),
    "clip with projection": (CLIPVisionModelWithProjection, CLIPVisionConfig(**VISION, projection_dim=7), PICTURES),
    "siglip": (SiglipVisionModel, SiglipVisionConfig(**VISION), SiglipImageProcessorPil(size={"height": 16, "width": 16})),
    "siglip without head": (
        SiglipVisionModel,
        SiglipVisionConfig(**VISION, vision_use_head=False),
        SiglipImageProcessorPil(size={"height": 16, "width": 16}),
    ),
    "dinov2": (Dinov2Model, Dinov2Config(**SIZES), PICTURES),
    "dinov2, another size": (Dinov2Model, Dinov2Config(**SIZES | dict(image_size=28), use_swiglu_ffn=True), PICTURES),
    "dinov2, 0 registers": (Dinov2WithRegistersModel, Dinov2WithRegistersConfig(**SIZES, num_register_tokens=0), PICTURES),
    "eva clip": (Blip2VisionModel, Blip2VisionConfig(**VISION), BlipImageProcessorPil(size={"height": 16, "width": 16})),
}


@pytest.mark.parametrize("name", ALONE)
def test_an_image_encoder_alone(tmp_path, name):
    kind, config, images = ALONE[name]
    model = randomised(kind(config))
    model.save_pretrained(tmp_path / "theirs")
    images.save_pretrained(tmp_path / "theirs")
    encoder = load(tmp_path / "theirs")
    with torch.no_grad():
        theirs = model(pixel_values=images(pictures(), return_tensors="pt")["pixel_values"])
    if name == "clip with projection":
        compare(encoder.embed_images(pictures()), theirs.image_embeds)
    elif name == "siglip without head":
        assert theirs.pooler_output is None
        with pytest.raises(RequestError, match=r"has no pooling head.*use features\(images\)"):
            encoder.embed_images(pictures())
    elif name != "eva clip":  # whose pooled output is normalised twice
        compare(encoder.embed_images(pictures()), theirs.pooler_output)
    if not name.startswith("clip"):  # CLIP's has not seen the norm that ours has
        compare(encoder.features(pictures()), theirs.last_hidden_state)
    exported_again(encoder, tmp_path / "theirs", kind, tmp_path / "ours")
    with pytest.raises(RequestError, match="only encodes images"):
        encoder.classify(pictures(), NAMES)
