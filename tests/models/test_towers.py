"""Published pairs of towers by name are those of the published configurations."""

import dataclasses

import pytest
from transformers import CLIPConfig, SiglipConfig

from vlm_jax.families import clip, siglip
from vlm_jax.models.towers import TOWERS, two_towers

L14 = dict(hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, patch_size=14)
TEXT_L14 = dict(hidden_size=768, intermediate_size=3072, num_attention_heads=12)
SO400M = dict(hidden_size=1152, intermediate_size=4304, num_hidden_layers=27, num_attention_heads=16)
PUBLISHED = {
    "clip-b/32": CLIPConfig(),
    "clip-l/14": CLIPConfig(vision_config=L14, text_config=TEXT_L14, projection_dim=768),
    "clip-l/14-336": CLIPConfig(vision_config=L14 | dict(image_size=336), text_config=TEXT_L14, projection_dim=768),
    "siglip-b/16": SiglipConfig(),
    "siglip-so400m/14-384": SiglipConfig(vision_config=SO400M | dict(patch_size=14, image_size=384), text_config=SO400M),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_sizes(name):
    family = clip if name.startswith("clip") else siglip
    published = family.config_from_hf(PUBLISHED[name])
    ends = dict(end_token=None)  # transformers' own default is the end token's number, the first release's the greatest
    assert dataclasses.replace(published, text=dataclasses.replace(published.text, **ends)) == two_towers(name)
    assert set(PUBLISHED) == set(TOWERS)
