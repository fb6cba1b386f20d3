"""CLIP and SigLIP against transformers: both towers, embeddings, logits, and zero-shot classification."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch_helpers import VOCAB, compare, converted, pixel_values, random_images, randomised, shapes_of, state_of
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPVisionModelWithProjection,
    SiglipConfig,
    SiglipModel,
)

from tests.tiny import mesh_of, thorough
from vlm_jax.families import clip, siglip
from vlm_jax.layers.decoder import Decoder
from vlm_jax.layers.stack import InterleavedLayers, LanguageInputs
from vlm_jax.models.dual_encoder import DualEncoder, ImageTower
from vlm_jax.sharding import place_tree

TOKENS, END, PAD = 12, 5, 1
VISION = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, image_size=16, patch_size=4)
TEXT = dict(
    hidden_size=24,
    intermediate_size=40,
    num_hidden_layers=2,
    num_attention_heads=3,
    vocab_size=VOCAB,
    max_position_embeddings=TOKENS,
    eos_token_id=END,
    bos_token_id=2,
    pad_token_id=PAD,
)
FAMILIES = {"clip": (CLIPConfig, CLIPModel, clip), "siglip": (SiglipConfig, SiglipModel, siglip)}
CASES = {  # family, and the changes of vision_config, text_config and the whole
    "clip": ("clip", dict(), dict(), dict(projection_dim=20)),
    "greatest token": ("clip", dict(hidden_act="gelu", patch_size=8), dict(eos_token_id=2), dict(projection_dim=8)),
    "padded with end": ("clip", dict(layer_norm_eps=0.1), dict(pad_token_id=END, hidden_act="gelu"), dict(projection_dim=17)),
    "siglip": ("siglip", dict(hidden_size=24, num_attention_heads=2), dict(), dict()),
    "other widths": ("siglip", dict(hidden_size=30, num_attention_heads=5), dict(projection_size=30), dict()),
    "erf": ("siglip", dict(hidden_act="gelu", image_size=18), dict(projection_size=32, layer_norm_eps=0.01), dict()),
}


def random_case(seed: int) -> tuple[str, dict, dict, dict]:
    rng = np.random.default_rng(seed)
    pick = lambda *choices: choices[rng.integers(len(choices))]

    def sizes() -> dict:
        heads = pick(1, 2, 3, 5)
        return dict(
            num_attention_heads=heads,
            hidden_size=heads * pick(6, 8, 14),
            intermediate_size=pick(20, 33, 64),
            num_hidden_layers=pick(1, 2, 3),
            hidden_act=pick("gelu", "quick_gelu", "gelu_pytorch_tanh", "relu"),
        )

    patch = pick(2, 3, 5)
    vision = sizes() | dict(patch_size=patch, image_size=patch * pick(1, 2, 3))
    text = sizes() | dict(eos_token_id=pick(2, END))
    if seed % 2:
        return "siglip", vision, text | dict(projection_size=vision["hidden_size"]), dict()
    return "clip", vision, text, dict(projection_dim=pick(8, 17))


RANDOM = {f"random {seed}": random_case(seed) for seed in range(6)}


def oracle(family, vision, text, both):
    """The torch model, ours, and the parameters."""
    hf_config, hf_model, ours = FAMILIES[family]
    published = hf_config(vision_config=VISION | vision, text_config=TEXT | text, **both)
    torch_model = randomised(hf_model(published))
    torch_model.logit_scale.data.fill_(3.3)  # so that logits differ from each other; trained ones are 4.6
    if family == "siglip":
        torch_model.logit_bias.data.fill_(6.0)  # so that the sigmoid does not saturate
    config = ours.config_from_hf(published)
    model = DualEncoder(config)
    side = config.image.encoder.image_size
    shapes = shapes_of(model, random_images(side, side), np.zeros((1, 2), np.int32))
    return torch_model, model, converted(state_of(torch_model), ours.table(config), shapes)


def texts(pad: int, rows: int = 3) -> np.ndarray:
    """End tokens at different places, padding behind them, and greater tokens than the end's before them."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(6, VOCAB, (rows, TOKENS), dtype=np.int32)
    for row, end in enumerate([TOKENS - 1, 4, 7]):
        tokens[row, end], tokens[row, end + 1 :] = END, pad
    return tokens


@pytest.mark.parametrize("case", [*CASES, *map(thorough, RANDOM)])
def test_embeddings_and_logits(case):
    family, vision, text, both = (CASES | RANDOM)[case]
    torch_model, model, params = oracle(family, vision, text, both)
    side = model.config.image.encoder.image_size
    pixels, tokens = random_images(side, side), texts((TEXT | text)["pad_token_id"])
    arguments = dict(input_ids=torch.tensor(tokens), pixel_values=pixel_values(pixels, model.config.image.encoder))
    with torch.no_grad():
        theirs = torch_model(**arguments)
        pooled = torch_model.get_image_features(arguments["pixel_values"]).pooler_output
        chosen = torch_model.get_text_features(arguments["input_ids"]).pooler_output

    def every(module, pixels, tokens):
        images, texts = module.embed_images(pixels), module.embed_texts(tokens)
        logits, chances = module.logits(images, texts), module.probabilities(images, texts)
        return module.image(pixels), module.text(tokens), images, texts, logits, chances

    run = jax.jit(lambda params: model.apply({"params": params}, pixels, tokens, method=every))
    image, text, image_embeds, text_embeds, logits, chances = run(params)
    compare(image, pooled)
    compare(text, chosen)
    for ours, expected in ((image_embeds, theirs.image_embeds), (text_embeds, theirs.text_embeds)):
        np.testing.assert_allclose(np.linalg.norm(ours, axis=1), 1, atol=1e-6)
        compare(ours * model.config.text.projection**0.5, expected * model.config.text.projection**0.5)
    compare(logits, theirs.logits_per_image)
    expected = theirs.logits_per_image.softmax(dim=1) if family == "clip" else theirs.logits_per_image.sigmoid()
    np.testing.assert_allclose(chances, expected, atol=1e-5)


@pytest.mark.parametrize("case", ["clip", "siglip"])
def test_every_hidden_state_of_the_text(case):
    torch_model, model, params = oracle(*CASES[case])
    tokens, params = texts(PAD), params["text"]["encoder"]
    tower = torch_model.text_model
    with torch.no_grad():
        hidden = tower(input_ids=torch.tensor(tokens), output_hidden_states=True).hidden_states
        normed = [tower.final_layer_norm(state) for state in hidden]
    positions = np.broadcast_to(np.arange(TOKENS, dtype=np.int32), tokens.shape)
    config = model.config.text.encoder
    seen = InterleavedLayers(every=1, offset=0, layers=np.zeros(config.layers), apply=lambda x, _: (x, x))
    for layers in range(1, config.layers + 1):
        lower = Decoder(dataclasses.replace(config, layers=layers), jnp.float32)
        some = {"params": params | {"layers": jax.tree.map(lambda p, n=layers: p[:n], params["layers"])}}
        x = lower.apply(some, tokens, method="embed")
        last_seen = None if model.config.text.causal else np.full(tokens.shape, TOKENS - 1, np.int32)
        inputs = LanguageInputs(x, interleaved=seen, prefix_end=last_seen)
        out = lower.apply(some, inputs, positions, np.ones_like(tokens))
        compare(out.hidden, normed[layers])
    for ours, expected in zip(out.interleaved, hidden[:-1], strict=True):
        compare(ours, expected)


@pytest.mark.parametrize(
    "changes", [dict(projection_dim=20), dict(projection_dim=7, num_attention_heads=2), dict(projection_dim=9, patch_size=8)]
)
def test_clips_image_tower_alone(changes):
    published = CLIPConfig(vision_config=VISION | changes).vision_config
    torch_model = randomised(CLIPVisionModelWithProjection(published))
    published.architectures = ["CLIPVisionModelWithProjection"]
    config = clip.image_config_from_hf(published)
    tower, pixels = ImageTower(config), random_images(16, 16)
    params = converted(state_of(torch_model), clip.image_table(config), shapes_of(tower, pixels))
    with torch.no_grad():
        theirs = torch_model(pixel_values=pixel_values(pixels, config.encoder)).image_embeds
    compare(jax.jit(tower.apply)({"params": params}, pixels), theirs)


def test_what_does_not_fit_is_refused():
    _, model, params = oracle(*CASES["siglip"])
    with pytest.raises(ValueError, match="13 tokens of text: the tower has learned 12 positions"):
        model.apply({"params": params}, np.ones((1, 13), np.int32), method="embed_texts")
    narrow = DualEncoder(dataclasses.replace(model.config, text=dataclasses.replace(model.config.text, projection=8)))
    with pytest.raises(ValueError, match="embeddings of images have width 24 and those of texts 8"):
        narrow.apply({"params": params}, random_images(16, 16), method="embed_images")
    published = CLIPConfig(vision_config=VISION, text_config=TEXT | dict(eos_token_id=[5, 6]))
    with pytest.raises(ValueError, match=r"eos_token_id=\[5, 6\]"):
        clip.config_from_hf(published)
    config = clip.config_from_hf(CLIPConfig(vision_config=VISION, text_config=TEXT))
    image = dataclasses.replace(config.image, encoder=dataclasses.replace(config.image.encoder, class_token="dropped"))
    with pytest.raises(ValueError, match="class_token='kept'"):
        ImageTower(image).init(jax.random.key(0), random_images(16, 16))


def test_every_parameter_has_its_place_on_the_mesh():
    _, model, _ = oracle(*CASES["siglip"])
    boxed = jax.eval_shape(model.init, jax.random.key(0), random_images(16, 16), np.zeros((1, 2), np.int32))["params"]
    placed = place_tree(boxed, mesh_of(data=1, fsdp=2, tensor=2))
    assert placed["text"]["projection"]["kernel"].spec == jax.sharding.PartitionSpec("fsdp", None)
    assert placed["image"]["pool"]["attention"]["query"]["kernel"].spec == jax.sharding.PartitionSpec("fsdp", "tensor", None)
