"""Torch models with random weights as oracles, and the same weights in ours."""

from __future__ import annotations

import math
import tempfile
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax.traverse_util import flatten_dict
from safetensors.numpy import load_file
from transformers import DynamicCache, PreTrainedModel

from vlm_jax.batch import Batch
from vlm_jax.config import DecoderConfig, ModelConfig, VitConfig
from vlm_jax.interop.engine import abstract_params, to_ours, to_published
from vlm_jax.interop.table import Table
from vlm_jax.layers.decoder import Cache, Decoder
from vlm_jax.layers.stack import InterleavedLayers, LanguageInputs
from vlm_jax.models.vlm import VisionLanguageModel
from vlm_jax.sharding import Named

VOCAB, TOKENS = 40, 12


def randomised(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Every parameter large enough to be seen in the output: matrices keep the scale, norms and biases change it."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if "embed_out" in name or (parameter.ndim >= 2 and "embed" not in name and "latents" not in name):
            inputs = parameter.shape[2:] if "experts" in name else parameter.shape[1:]
            noise *= 1.2 / math.prod(inputs) ** 0.5
        elif "embed_tokens" in name or "wte" in name:
            noise *= 0.3  # may also be the head
        elif parameter.ndim == 1 and "norm" in name and name.endswith("weight"):
            noise = 1 + 0.3 * noise
        parameter.data.copy_(noise)
    return model.eval()


def state_of(model: torch.nn.Module) -> dict[str, np.ndarray]:
    return {name: tensor.numpy() for name, tensor in model.state_dict().items()}


def saved_state(model: PreTrainedModel) -> dict[str, np.ndarray]:
    """What `save_pretrained` writes: the names of files on the hub, which may not be those in memory."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return load_file(f"{folder}/model.safetensors")


def converted(state: dict[str, np.ndarray], table: Table, abstract: Any) -> Any:
    """Our parameters, after a round trip that must give every published tensor back as it was."""
    params = to_ours(state, table, abstract)
    back = to_published(params, table)
    left_out = {copy.name for copy in table.copies}
    assert set(state) - set(back) <= left_out
    for name, tensor in back.items():
        np.testing.assert_array_equal(tensor, state[name], err_msg=name)
    again = flatten_dict(to_ours(back, table, abstract), sep="/")
    for path, leaf in flatten_dict(params, sep="/").items():
        np.testing.assert_array_equal(again[path], leaf, err_msg=path)
    return params


def shapes_of(module: nn.Module, *args: Any) -> Any:
    """Of the parameters of `module` called with `args`."""
    boxed = jax.eval_shape(module.init, jax.random.key(0), *args)["params"]
    return jax.tree.map(lambda box: box.value, boxed, is_leaf=lambda x: isinstance(x, Named))


def random_images(height: int, width: int, rows: int = 2) -> np.ndarray:
    return np.random.default_rng(1).integers(0, 256, (rows, height, width, 3), dtype=np.uint8)


def pixel_values(pixels: np.ndarray, config: VitConfig) -> torch.Tensor:
    """What a published processor makes of pictures of the right size."""
    x = (pixels / 255.0 - np.array(config.mean)) / np.array(config.std)
    return torch.tensor(x.transpose(0, 3, 1, 2), dtype=torch.float32)


def text_batch(tokens: np.ndarray, **fields: np.ndarray) -> Batch:
    """One segment a row, read causally; no images unless given."""
    rows, length = tokens.shape
    zeros = np.zeros((rows, length), np.int32)
    positions = np.repeat(np.arange(length, dtype=np.int32)[None], rows, axis=0)
    values = dict(
        images=np.zeros((rows, 1, 1, 1, 1, 3), np.uint8),
        frames=np.zeros((rows, 1), np.int32),
        tokens=tokens,
        positions=positions,
        segments=zeros + 1,
        media_last=zeros,
        media_first=zeros,
        prefix_end=positions,
        targets=zeros,
        weights=zeros.astype(np.float32),
    )
    return Batch(**values | fields)


def random_tokens(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(3, VOCAB, (2, TOKENS), dtype=np.int32)


def random_sizes(seed: int) -> dict[str, Any]:
    """A language model's sizes in transformers' names; the width is a multiple of the heads, as some models want it."""
    rng = np.random.default_rng(seed)
    draw = lambda *choices: choices[rng.integers(len(choices))]
    kv_heads, group, head_width = draw(1, 2, 3), draw(1, 2, 3), draw(4, 6, 10)
    heads = kv_heads * group
    return dict(
        vocab_size=VOCAB,
        hidden_size=heads * head_width,
        intermediate_size=draw(17, 24, 40),
        num_hidden_layers=draw(1, 2, 4),
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=draw(head_width, 8, 14),
        max_position_embeddings=64,
        tie_word_embeddings=draw(False, True),
    )


def compare(ours: Any, theirs: torch.Tensor, tolerance: float = 1e-4) -> None:
    """Largest difference below `tolerance`, between values that are worth comparing."""
    ours, theirs = np.asarray(ours), theirs.detach().numpy()
    assert ours.shape == theirs.shape
    assert theirs.std() > 0.1, "the oracle's output is too small to tell anything"
    difference = np.abs(ours - theirs).max()
    print(f"largest difference {difference:.1e} of {np.abs(theirs).max():.1f}")
    assert difference < tolerance


def rounding(theirs: torch.Tensor) -> float:
    """What float32 rounding may come to: 1e-4, and more where values are above 10, with which it grows."""
    return max(1e-4, 1e-5 * float(theirs.abs().max()))


def compare_language_model(oracle: torch.nn.Module, config: DecoderConfig, table: Table, tolerance: float = 1e-4) -> None:
    """Hidden states layer by layer and logits of the same tokens, from the oracle's weights made random."""
    tokens = random_tokens()
    hidden, logits = run_language_model(oracle, config, table, tokens)
    with torch.no_grad():
        theirs = oracle(input_ids=torch.tensor(tokens), output_hidden_states=True)
    assert len(theirs.hidden_states) == len(hidden) == config.layers + 1
    for number, (ours, expected) in enumerate(zip(hidden, theirs.hidden_states, strict=True)):
        # The last of OPT-350M's has the width of its head, where ours has it not yet.
        if number < config.layers or config.embedding_width is None:
            compare(ours, expected, tolerance)
    compare(logits, theirs.logits, tolerance)


def language_params(oracle: torch.nn.Module, config: DecoderConfig, table: Table) -> Any:
    """The oracle's weights, made random, as the parameters of a `Decoder`."""
    model = VisionLanguageModel(ModelConfig(vision=None, connector=None, fusion=None, language=config))
    state = saved_state(randomised(oracle))
    state |= {copy.name: state[copy.of] for copy in table.copies}  # as older files have them
    return converted(state, table.under(ours="language/"), abstract_params(model))["language"]


def run_language_model(oracle: torch.nn.Module, config: DecoderConfig, table: Table, tokens: np.ndarray) -> tuple[Any, Any]:
    """What enters every layer and what leaves the last norm, [L + 1, B, T, D], and the logits."""
    positions = text_batch(tokens).positions
    seen = InterleavedLayers(every=1, offset=0, layers=jnp.zeros(config.layers), apply=lambda x, _: (x, x))

    def whole(decoder: Decoder, tokens: np.ndarray) -> tuple[Any, Any]:
        inputs = LanguageInputs(decoder.embed(tokens), interleaved=seen)
        out = decoder(inputs, positions, jnp.ones_like(positions))
        return jnp.concatenate([out.interleaved, out.hidden[None]]), decoder.head(out.hidden)

    module = Decoder(config, jnp.float32)
    return jax.jit(lambda params: module.apply({"params": params}, tokens, method=whole))(
        language_params(oracle, config, table)
    )


def decoded(params: Any, config: DecoderConfig, tokens: np.ndarray, prompt: int) -> np.ndarray:
    """Logits [B, T, V] of a prompt of so many tokens at once, and of the rest one by one with the cache."""
    module = Decoder(config, jnp.float32)

    @jax.jit
    def step(params: Any, cache: Cache | None, tokens: np.ndarray) -> tuple[Any, Cache]:
        begin = 0 if cache is None else cache.used[:, None]
        positions = begin + jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)

        def some(decoder: Decoder) -> tuple[Any, Cache]:
            x = decoder.embed(tokens)
            out = decoder(LanguageInputs(x), positions, jnp.ones_like(positions), cache=cache, return_cache=True)
            return decoder.head(out.hidden), out.cache

        return module.apply({"params": params}, method=some)

    cache, logits = None, []
    for part in np.split(tokens, range(prompt, tokens.shape[1]), axis=1):
        some, cache = step(params, cache, part)
        cache = cache.with_slots(tokens.shape[1])
        logits.append(some)
    return np.concatenate(logits, axis=1)


def decoded_by_torch(oracle: torch.nn.Module, tokens: np.ndarray, prompt: int) -> torch.Tensor:
    """The same from the oracle with its cache."""
    cache, logits = DynamicCache(config=oracle.config), []
    with torch.no_grad():
        for part in np.split(tokens, range(prompt, tokens.shape[1]), axis=1):
            logits.append(oracle(input_ids=torch.tensor(part), past_key_values=cache, use_cache=True).logits)
    return torch.cat(logits, dim=1)
