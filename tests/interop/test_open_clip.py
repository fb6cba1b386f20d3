"""CLIP under its original names, against torch modules that have them, with torch's own attention and its fused weights; and
open_clip's pictures, from files.
"""

import importlib.util
from collections import OrderedDict

import jax
import numpy as np
import pytest
import torch
from folders import picture
from openflamingo_reference import MEAN, STD, open_clip_pixels
from PIL import Image
from torch import nn
from torch_helpers import VOCAB, compare, converted, pixel_values, random_images, randomised, shapes_of, state_of
from transformers import CLIPConfig, CLIPImageProcessorPil

from vlm_jax.families import clip, open_clip
from vlm_jax.families.open_clip import OpenClipTransform
from vlm_jax.interop.engine import to_ours
from vlm_jax.models.dual_encoder import DualEncoder
from vlm_jax.processing.media import PublishedMedia


class Activation(nn.Module):
    def __init__(self, name):
        super().__init__()
        self.name = name

    def forward(self, x):
        return x * torch.sigmoid(1.702 * x) if self.name == "quick_gelu" else nn.functional.gelu(x)


class ResBlock(nn.Module):
    def __init__(self, width, heads, mlp_width, activation, mask):
        super().__init__()
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        up, down = nn.Linear(width, mlp_width), nn.Linear(mlp_width, width)
        self.mlp = nn.Sequential(OrderedDict(c_fc=up, gelu=Activation(activation), c_proj=down))
        self.mask = mask

    def forward(self, x):
        y = self.ln_1(x)
        x = x + self.attn(y, y, y, need_weights=False, attn_mask=self.mask)[0]
        return x + self.mlp(self.ln_2(x))


def transformer(config, mask=None):
    sizes = config.hidden_size, config.num_attention_heads, config.intermediate_size, config.hidden_act
    blocks = [ResBlock(*sizes, mask) for _ in range(config.num_hidden_layers)]
    return nn.ModuleDict(dict(resblocks=nn.Sequential(*blocks)))


class Visual(nn.Module):
    def __init__(self, config, embed):
        super().__init__()
        width, patch = config.hidden_size, config.patch_size
        self.conv1 = nn.Conv2d(3, width, patch, patch, bias=False)
        self.class_embedding = nn.Parameter(torch.empty(width))
        self.positional_embedding = nn.Parameter(torch.empty((config.image_size // patch) ** 2 + 1, width))
        self.ln_pre, self.ln_post = nn.LayerNorm(width), nn.LayerNorm(width)
        self.transformer = transformer(config)
        self.proj = nn.Parameter(torch.empty(width, embed))

    def forward(self, pixels):
        x = self.conv1(pixels).flatten(2).mT
        x = torch.cat([self.class_embedding.expand(len(x), 1, -1), x], dim=1) + self.positional_embedding
        x = self.transformer["resblocks"](self.ln_pre(x))
        return self.ln_post(x[:, 0]) @ self.proj


class Clip(nn.Module):
    def __init__(self, config):
        super().__init__()
        text, self.visual = config.text_config, Visual(config.vision_config, config.projection_dim)
        length = text.max_position_embeddings
        self.transformer = transformer(text, torch.full((length, length), -torch.inf).triu(1))
        self.token_embedding = nn.Embedding(text.vocab_size, text.hidden_size)
        self.positional_embedding = nn.Parameter(torch.empty(length, text.hidden_size))
        self.ln_final = nn.LayerNorm(text.hidden_size)
        self.text_projection = nn.Parameter(torch.empty(text.hidden_size, config.projection_dim))
        self.logit_scale = nn.Parameter(torch.tensor(3.3))

    def forward(self, pixels, tokens):
        x = self.transformer["resblocks"](self.token_embedding(tokens) + self.positional_embedding)
        texts = self.ln_final(x)[torch.arange(len(x)), tokens.argmax(dim=1)] @ self.text_projection
        texts, images = (nn.functional.normalize(y, dim=1) for y in (texts, self.visual(pixels)))
        return self.logit_scale.exp() * images @ texts.T


def hf_config(vision, text, embed):
    vision = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4) | vision
    text = dict(hidden_size=24, intermediate_size=40, num_hidden_layers=3, num_attention_heads=2, vocab_size=VOCAB) | text
    text |= dict(max_position_embeddings=9, eos_token_id=VOCAB - 1)
    return CLIPConfig(vision_config=dict(image_size=16, patch_size=4) | vision, text_config=text, projection_dim=embed)


@pytest.mark.parametrize(
    "vision, text, embed",
    [
        (dict(), dict(), 16),
        (dict(hidden_act="gelu", hidden_size=30, num_attention_heads=3), dict(hidden_act="gelu", num_hidden_layers=1), 10),
        (dict(image_size=15, patch_size=5, num_hidden_layers=1), dict(hidden_size=21, num_attention_heads=3), 7),
    ],
    ids=["quick_gelu", "gelu", "odd"],
)
def test_the_original_names(vision, text, embed):
    published = hf_config(vision, text, embed)
    torch_model = randomised(Clip(published))
    torch_model.logit_scale.data.fill_(3.3)  # so that logits differ from each other
    config = clip.config_from_hf(published)
    table, model, side = open_clip.table(config), DualEncoder(config), config.image.encoder.image_size
    pixels, tokens = random_images(side, side), np.random.default_rng(0).integers(0, VOCAB - 1, (3, 9), dtype=np.int32)
    tokens[[0, 1, 2], [8, 3, 5]] = VOCAB - 1
    state, shapes = state_of(torch_model), shapes_of(model, pixels, tokens)
    params = converted(state, table, shapes)
    with torch.no_grad():
        theirs = torch_model(pixel_values(pixels, config.image.encoder), torch.tensor(tokens))
    compare(jax.jit(model.apply)({"params": params}, pixels, tokens), theirs)

    # Other ways to write the same: open_clip's text tower as a part, and the scalars of OpenAI's archives.
    parts = {name if name.startswith(("visual.", "logit_scale")) else f"text.{name}": value for name, value in state.items()}
    parts |= {name: np.array(1) for name in ("input_resolution", "context_length", "vocab_size")}
    jax.tree.map(np.testing.assert_array_equal, to_ours(parts, table, shapes), params)


SIDE = 16


def written(folder, mode, size, kind):
    """A picture's file; a mode with alpha has transparent places."""
    image = picture(size[0], *size)
    if mode == "P":
        image = image.quantize(7)
    elif mode in ("LA", "RGBA"):
        image = image.convert(mode)
        image.putalpha(picture(size[1], *size).convert("L"))
    path = folder / f"{mode}_{size[0]}x{size[1]}.{kind}"
    image.convert(mode).save(path)
    return path


# The corner of the cut lies at 5.5, 3.5, 2.5, 0.5 and 1.5 pixels; at whole ones; at none; and pictures grow.
SIZES = [(29, 17), (30, 44), (20, 27), (17, 16), (16, 19), (17, 20), (33, 33), (9, 14), (1, 5)]
MODES = [("RGB", "png"), ("L", "png"), ("P", "png"), ("RGBA", "png"), ("LA", "png"), ("RGB", "jpg"), ("CMYK", "jpg")]


@pytest.mark.parametrize("mode, kind", MODES)
def test_pictures_are_open_clips(tmp_path, mode, kind):
    media = PublishedMedia(OpenClipTransform(SIDE), SIDE, tile_tokens=0)
    for size in SIZES:
        path = written(tmp_path, mode, size, kind)
        (ours,) = media.pixels((path,))
        theirs = open_clip_pixels(Image.open(path), SIDE) * torch.tensor(STD)[:, None, None] + torch.tensor(MEAN)[:, None, None]
        np.testing.assert_array_equal(ours, (255 * theirs).round().permute(1, 2, 0).numpy(), err_msg=path.name)


def test_half_a_pixel_is_cut_elsewhere_than_by_transformers():
    square = dict(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})
    theirs, ours = PublishedMedia(CLIPImageProcessorPil(**square), SIDE, 0), PublishedMedia(OpenClipTransform(SIDE), SIDE, 0)
    same = [np.array_equal(*(media.pixels((picture(3, 16, 16 + more),))[0] for media in (theirs, ours))) for more in range(8)]
    assert same == [True, True, True, False, True, True, True, False]  # halves of 0, 1, 2, ... pixels: 1.5 and 3.5 go up


def test_a_thin_picture_is_refused(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10_000)
    media = PublishedMedia(OpenClipTransform(SIDE), SIDE, tile_tokens=0)
    assert media.pixels((picture(0, 1, 39),))[0].shape == (SIDE, SIDE, 3)
    with pytest.raises(
        ValueError, match=r"picture <pixels>: .*40x1 is too thin: resized to 16x640 it has more than 10,000 pixels"
    ):
        media.pixels((picture(0, 1, 40),))


@pytest.mark.skipif(not importlib.util.find_spec("torchvision"), reason="needs torchvision")
def test_the_reference_is_what_torchvision_computes():
    from torchvision import transforms

    cut = transforms.Compose([transforms.Resize(SIDE, transforms.InterpolationMode.BICUBIC), transforms.CenterCrop(SIDE)])
    rest = transforms.Compose([transforms.ToTensor(), transforms.Normalize(MEAN, STD)])
    for height, width in SIZES:
        image = picture(height, height, width)
        compare(open_clip_pixels(image, SIDE), rest(cut(image).convert("RGB")), 1e-6)
