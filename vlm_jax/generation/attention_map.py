"""For every generated word, where in the pictures the model looked.

A text token looks at the resampler's latents (gated cross-attention), and these at the patches. Both are put together: the
gated layers are averaged with |tanh(gate)| as weights, and followed through the resampler by attention rollout
(Abnar & Zuidema 2020).
"""

from __future__ import annotations

import dataclasses
import functools
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from vlm_jax.batch import Batch
from vlm_jax.config.generation import Settings
from vlm_jax.errors import RequestError
from vlm_jax.generation.attention_picture import AttentionMaps
from vlm_jax.generation.request import Request
from vlm_jax.models.vlm import VisionLanguageModel
from vlm_jax.processing.layout import Layout

if TYPE_CHECKING:
    from vlm_jax.generation.generator import Answer, Generator

Array = jax.Array


def rollout(weights: Array) -> Array:
    """Which patches each latent knows, in the end: [layers, ..., R, P + R] -> [..., R, P], each row's sum 1.

    At first the latents know nothing of the image. A layer brings what they look at themselves and what the latents they
    look at know already; the residual keeps what they knew, with the same share.
    """
    count = weights.shape[-2]
    known = jnp.zeros((*weights.shape[1:-1], weights.shape[-1] - count), weights.dtype)
    for layer in weights:
        features, latents = layer[..., :-count], layer[..., -count:]
        known = 0.5 * known + 0.5 * (features + latents @ known)
        known = known / jnp.maximum(jnp.sum(known, axis=-1, keepdims=True), jnp.finfo(known.dtype).tiny)
    return known


def attention_over_patches(model: VisionLanguageModel, params: Any, prompts: Batch) -> Array:
    """Where every token looks: [B, T, M, I * P], the sum over the last two 1, or 0 for a token that sees no image."""
    apply = lambda method, *args, **named: model.apply({"params": params}, *args, **named, method=method)
    visual, resampler = apply("encode_images", prompts.images, prompts.frames, sizes=prompts.sizes, return_attention=True)
    slots, latents = visual.shape[1:3]
    gated = apply("forward", prompts, visual=visual, return_attention=True).interleaved
    layers = params["fusion"]["layers"]
    gates = jnp.stack([p["attention_gate"] for p in layers]) if isinstance(layers, tuple) else layers["attention_gate"]
    gates = jnp.abs(jnp.tanh(gates.astype(jnp.float32)))
    # Closed gates let nothing through: where all are closed, the layers count alike.
    shares = jnp.where(jnp.sum(gates) > 0, gates / jnp.maximum(jnp.sum(gates), 1e-30), 1 / gates.shape[0])
    tokens = jnp.einsum("L,LBTS->BTS", shares, gated)
    tokens = tokens.reshape(*tokens.shape[:2], slots, latents)
    return jnp.einsum("BTMR,BMRP->BTMP", tokens, rollout(resampler))


def check_visible(generator: Generator, request: Request) -> None:
    """Whether there is something to look at.

    Raises:
      RequestError: there is not.
    """
    if not request.media:
        raise RequestError("an attention map needs a picture, and the request has none")
    if not generator.model.uses_cross_attention:
        raise RequestError("attention maps are drawn of gated cross-attention, and this model has none")
    if generator.processor.blind:
        raise RequestError("an attention map needs a picture, and this run was trained to see none (blank_images)")
    if why := _no_attention(generator.model):  # before an answer is generated for nothing
        raise RequestError(f"attention maps need a connector that attends: {why}")


@functools.cache
def _no_attention(model: VisionLanguageModel) -> str:
    """Why the connector gives no attention; "" if it does."""
    example = model.example()[0]
    encode = functools.partial(model.init, method="encode_images", return_attention=True)
    try:
        jax.eval_shape(encode, jax.random.key(0), example.images, example.frames)
    except ValueError as error:
        return str(error)
    return ""


def attention_maps(generator: Generator, request: Request, answer: Answer) -> AttentionMaps:
    """The maps of an answer, from one pass over the prompt and the answer.

    What a token looked at when it was chosen is read at the place before it: that place's hidden state predicts it.

    Raises:
      RequestError: there is no picture to look at.
    """
    check_visible(generator, request)
    prompt = generator.prompt(request, 0, Settings())
    ids = [token for token in answer.tokens if token not in generator.processor.ends]
    layout = prompt.layout
    extend = lambda media: np.append(media, np.repeat(media[-1:], len(ids)))
    nothing = np.zeros(len(ids), np.int32)
    whole = Layout(
        tokens=np.append(layout.tokens, ids).astype(np.int32),
        flags=np.append(layout.flags, nothing).astype(np.uint8),
        visual=np.append(layout.visual, nothing),
        media_last=extend(layout.media_last),
        media_first=extend(layout.media_first),
    )
    batch = generator.place([dataclasses.replace(prompt, layout=whole)])
    looks = np.asarray(generator.programs.call(attention_over_patches, batch))[0]
    length = len(whole.tokens)
    chosen = looks[length - len(ids) - 1 : length - 1]  # [answer tokens, M, I * P]
    words, spans = group_words(generator.processor.tokenizer, ids)
    frames, vision = np.asarray(batch.frames)[0], generator.model.config.vision
    most = batch.images.shape[2]
    chosen = chosen.reshape(*chosen.shape[:2], most, -1)[..., vision.front_features :]
    there = [(slot, frame) for slot in range(len(frames)) for frame in range(frames[slot])]
    side = batch.images.shape[-2] // vision.patch_size
    merged = [np.mean([chosen[token] for token in span], axis=0) for span in spans]
    maps = np.asarray([[word[place].reshape(side, side) for place in there] for word in merged])
    total = maps.sum(axis=(1, 2, 3), keepdims=True) if len(words) else 1.0
    pictures = np.asarray(batch.images)[0]
    return AttentionMaps(words, maps / np.maximum(total, 1e-30), np.asarray([pictures[place] for place in there]))


def group_words(tokenizer: Any, ids: list[int]) -> tuple[list[str], list[range]]:
    """Words of the text, and the tokens each is made of; a word begins at white space."""
    words: list[str] = []
    spans: list[range] = []
    before = ""
    for place in range(len(ids)):
        text = tokenizer.decode(ids[: place + 1], special=False)
        piece, before = text[len(before) :], text
        if not words or (piece[:1].isspace() and words[-1].strip()):
            words.append(piece)
            spans.append(range(place, place + 1))
        else:
            words[-1] += piece
            spans[-1] = range(spans[-1].start, place + 1)
    return [word.strip() for word in words], spans
