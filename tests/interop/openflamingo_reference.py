"""OpenFlamingo's modules in PyTorch, for the tests: what `open_flamingo` 2.0.1 computes, under its parameter names.

`test_openflamingo.py` holds them against the package itself where that is installed (`pip install --no-deps open-flamingo
einops einops-exts`; its pinned requirements do not go together with today's).
"""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from torch import nn

MEAN, STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]


def feed_forward(width: int) -> nn.Sequential:
    maps = (nn.Linear(width, 4 * width, bias=False), nn.GELU(), nn.Linear(4 * width, width, bias=False))
    return nn.Sequential(nn.LayerNorm(width), *maps)


def heads(x: torch.Tensor, count: int) -> torch.Tensor:
    """[B, T, N * H] -> [B, N, T, H]"""
    return x.unflatten(-1, (count, -1)).transpose(-3, -2)


class PerceiverAttention(nn.Module):
    def __init__(self, dim: int, dim_head: int = 64, heads: int = 8) -> None:
        super().__init__()
        self.heads, inner = heads, heads * dim_head
        self.norm_media, self.norm_latents = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.to_q = nn.Linear(dim, inner, bias=False)
        self.to_kv = nn.Linear(dim, 2 * inner, bias=False)
        self.to_out = nn.Linear(inner, dim, bias=False)

    def forward(self, x: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
        x, latents = self.norm_media(x), self.norm_latents(latents)
        k, v = self.to_kv(torch.cat((x, latents), dim=-2)).chunk(2, dim=-1)
        y = nn.functional.scaled_dot_product_attention(*(heads(one, self.heads) for one in (self.to_q(latents), k, v)))
        return self.to_out(y.transpose(-3, -2).flatten(-2))


class PerceiverResampler(nn.Module):
    """[B, images, frames, patches, D] -> [B, images, latents, D]"""

    def __init__(self, dim: int, depth: int, num_latents: int) -> None:
        super().__init__()
        self.latents = nn.Parameter(torch.randn(num_latents, dim))
        self.layers = nn.ModuleList(nn.ModuleList([PerceiverAttention(dim), feed_forward(dim)]) for _ in range(depth))
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.flatten(2, 3)
        latents = self.latents.expand(*x.shape[:2], -1, -1)
        for attention, mlp in self.layers:
            latents = latents + attention(x, latents)
            latents = latents + mlp(latents)
        return self.norm(latents)


class MaskedCrossAttention(nn.Module):
    def __init__(self, dim: int, dim_visual: int, only_attend_immediate_media: bool = True) -> None:
        super().__init__()
        self.heads, inner = 8, 512
        self.norm = nn.LayerNorm(dim)
        self.to_q = nn.Linear(dim, inner, bias=False)
        self.to_kv = nn.Linear(dim_visual, 2 * inner, bias=False)
        self.to_out = nn.Linear(inner, dim, bias=False)
        self.only_last = only_attend_immediate_media

    def forward(self, x: torch.Tensor, media: torch.Tensor, media_locations: torch.Tensor) -> torch.Tensor:
        images, latents = media.shape[1:3]
        k, v = self.to_kv(media.flatten(1, 2)).chunk(2, dim=-1)
        q, k, v = (heads(one, self.heads) for one in (self.to_q(self.norm(x)), k, v))
        logits = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
        time = media_locations.cumsum(dim=-1)[:, None, :, None]
        image = torch.arange(1, images + 1).repeat_interleave(latents)
        seen = time == image if self.only_last else time >= image
        # A large number and not infinity: a token that may see nothing looks at everything alike ...
        weights = logits.masked_fill(~seen, -torch.finfo(logits.dtype).max).softmax(dim=-1)
        if self.only_last:
            weights = weights.masked_fill(time == 0, 0.0)  # ... and here at nothing
        return self.to_out((weights @ v).transpose(1, 2).flatten(-2))


class GatedCrossAttentionBlock(nn.Module):
    def __init__(self, dim: int, dim_visual: int, only_attend_immediate_media: bool = True) -> None:
        super().__init__()
        self.attn = MaskedCrossAttention(dim, dim_visual, only_attend_immediate_media)
        self.attn_gate = nn.Parameter(torch.tensor([0.0]))
        self.ff = feed_forward(dim)
        self.ff_gate = nn.Parameter(torch.tensor([0.0]))

    def forward(self, x: torch.Tensor, media: torch.Tensor, media_locations: torch.Tensor) -> torch.Tensor:
        x = x + self.attn(x, media, media_locations=media_locations) * self.attn_gate.tanh()
        return x + self.ff(x) * self.ff_gate.tanh()


class Flamingo(nn.Module):
    """The language model with gated blocks before layers 'every - 1', '2 every - 1', ..., and the patches it reads."""

    def __init__(self, vision, language, layers, every: int, image_id: int, latents: int, depth: int, only_last: bool) -> None:
        super().__init__()
        width = vision.config.hidden_size
        self.vision, self.lang_encoder, self.image_id = vision, language, image_id
        self.perceiver = PerceiverResampler(width, depth, latents)
        self.gated = nn.ModuleDict()
        for number, layer in enumerate(layers):
            if (number + 1) % every == 0:
                block = GatedCrossAttentionBlock(language.config.hidden_size, width, only_last)
                self.gated[str(number)] = block
                layer.register_forward_pre_hook(self._before(block), with_kwargs=True)

    def _before(self, block):
        def hook(module, args, kwargs):
            # Some layers get their input by position, others by name.
            if args:
                return (block(args[0], self.media, self.places), *args[1:]), kwargs
            return args, kwargs | {"hidden_states": block(kwargs["hidden_states"], self.media, self.places)}

        return hook

    def forward(self, input_ids: torch.Tensor, pixels: torch.Tensor) -> torch.Tensor:
        """ids [B, T], pixels [B, images, 3, H, W] -> logits."""
        patches = self.vision(pixels.flatten(0, 1), output_hidden_states=True).hidden_states[-1][:, 1:]
        self.media = self.perceiver(patches.unflatten(0, pixels.shape[:2])[:, :, None])
        self.places = input_ids == self.image_id
        return self.lang_encoder(input_ids=input_ids, use_cache=False).logits


def open_clip_pixels(picture: Image.Image, side: int) -> torch.Tensor:
    """[3, side, side], normalised: what open_clip's transform for inference makes of a picture.

    torchvision rounds the longer side down, and the corner of the cut as Python does: 0.5 to 0, 1.5 to 2.
    """
    width, height = picture.size
    size = (side, int(side * height / width)) if width <= height else (int(side * width / height), side)
    picture = picture.resize(size, Image.Resampling.BICUBIC)
    left, top = round((size[0] - side) / 2.0), round((size[1] - side) / 2.0)
    picture = picture.crop((left, top, left + side, top + side)).convert("RGB")
    pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1) / 255
    return (pixels - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
