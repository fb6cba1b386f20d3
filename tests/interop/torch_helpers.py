"""Torch models with random weights as oracles, and the same weights in ours."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import torch
from flax.traverse_util import flatten_dict

from vlm_jax.config import DecoderConfig, ModelConfig
from vlm_jax.data.batch import Batch
from vlm_jax.interop.engine import abstract_params, to_ours, to_published
from vlm_jax.interop.table import Table
from vlm_jax.models.vlm import VisionLanguageModel

VOCAB, TOKENS = 40, 12


def randomised(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Every parameter large enough to be seen in the output: matrices keep the scale, norms and biases change it."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim >= 2 and "embed" not in name and "latents" not in name:
            noise *= 1.2 / parameter[0].numel() ** 0.5
        elif "embed_tokens" in name or "wte" in name:
            noise *= 0.3  # may also be the head
        elif parameter.ndim == 1 and "norm" in name and name.endswith("weight"):
            noise = 1 + 0.3 * noise
        parameter.data.copy_(noise)
    return model.eval()


def state_of(model: torch.nn.Module) -> dict[str, np.ndarray]:
    return {name: tensor.numpy() for name, tensor in model.state_dict().items()}


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


def text_batch(tokens: np.ndarray, **fields: np.ndarray) -> Batch:
    """One segment a row; no images unless given."""
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
        targets=zeros,
        weights=zeros.astype(np.float32),
    )
    return Batch(**values | fields)


def random_tokens(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(3, VOCAB, (2, TOKENS), dtype=np.int32)


def compare(ours: Any, theirs: torch.Tensor, tolerance: float = 1e-4) -> None:
    """Largest difference below `tolerance`, between values that are worth comparing."""
    ours, theirs = np.asarray(ours), theirs.detach().numpy()
    assert ours.shape == theirs.shape
    assert theirs.std() > 0.1, "the oracle's output is too small to tell anything"
    difference = np.abs(ours - theirs).max()
    print(f"largest difference {difference:.1e} of {np.abs(theirs).max():.1f}")
    assert difference < tolerance


def compare_language_model(oracle: torch.nn.Module, config: DecoderConfig, table: Table, tolerance: float = 1e-4) -> None:
    """Logits of the same tokens, from the oracle's weights made random."""
    model = VisionLanguageModel(ModelConfig(vision=None, connector=None, fusion=None, language=config))
    params = converted(state_of(randomised(oracle)), table.under(ours="language/"), abstract_params(model))
    tokens = random_tokens()
    logits = jax.jit(model.apply)({"params": params}, text_batch(tokens))
    with torch.no_grad():
        compare(logits, oracle(input_ids=torch.tensor(tokens)).logits, tolerance)
