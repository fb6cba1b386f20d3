"""GGUF files of the LLaMA kind: weights, config, tokenizer and chat template in one file.

In its table a head has P rotary pairs, and Q counts the two of a pair; the other letters are those of `table.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vlm_jax.config import BlockConfig, DecoderConfig, LinearScaling, LongRopeScaling, ModelConfig, NormConfig, RopeConfig
from vlm_jax.config.consistency import check_consistent
from vlm_jax.interop.checkpoint import Checkpoint
from vlm_jax.interop.files import bounds
from vlm_jax.interop.files.gguf import read_gguf
from vlm_jax.interop.files.gguf_tokenizer import tokenizer_of
from vlm_jax.interop.files.settings import check_settings
from vlm_jax.interop.files.source import PublishedError, Source
from vlm_jax.interop.published import language_processor
from vlm_jax.interop.register import FILES
from vlm_jax.interop.table import Table, row

LAYER = "blk.{}."
FREQUENCIES = "rope_freqs.weight"


@FILES.add(".gguf")
def open_gguf(path: Path) -> Checkpoint:
    """
    Raises:
      PublishedError: no such file, or not one that can be read.
      TokenizerError: a kind of tokenizer that is not implemented.
    """
    fields, source = read_gguf(path)
    check_settings(path, fields, bounds.GGUF)
    try:
        config = config_from_fields(fields, source)
        check_consistent(config)
    except ValueError as error:
        raise PublishedError(f"{path}: {error}") from error
    tokenizer = tokenizer_of(fields)
    processor = language_processor(tokenizer)
    processor.limit_to(config.vocab_size)

    def keep_files(folder: Path) -> None:
        tokenizer.save_pretrained(folder)

    return Checkpoint(
        path=path,
        config=ModelConfig(vision=None, connector=None, fusion=None, language=config),
        processor=processor,
        tables=(table(config).under(ours="language/"),),
        open_source=lambda: source,
        keep_files=keep_files,
        exported_name=None,
    )


def table(config: DecoderConfig) -> Table:
    """Names in the file <-> the paths of a `Decoder`.

    llama.cpp turns neighbours of a head where LLaMA's published layout turns its halves; rows of queries and keys are ordered
    for that.
    """
    attention, pairs = "layers/attention/", dict(P=config.block.head_width // 2, Q=2)
    rows = [
        row("token_embd.weight", "embedding", "V D -> V D"),
        row("output_norm.weight", "final_norm/scale", "D -> D"),
        row(f"{LAYER}attn_norm.weight", "layers/attention_norm/scale", "D -> D"),
        row(f"{LAYER}attn_q.weight", f"{attention}query/kernel", "(N P Q) D -> D N (Q P)", **pairs),
        row(f"{LAYER}attn_k.weight", f"{attention}key/kernel", "(K P Q) D -> D K (Q P)", **pairs),
        row(f"{LAYER}attn_v.weight", f"{attention}value/kernel", "(K H) D -> D K H"),
        row(f"{LAYER}attn_output.weight", f"{attention}out/kernel", "D (N H) -> N H D"),
        row(f"{LAYER}ffn_norm.weight", "layers/mlp_norm/scale", "D -> D"),
        row(f"{LAYER}ffn_gate.weight", "layers/mlp/gate/kernel", "F D -> D F"),
        row(f"{LAYER}ffn_up.weight", "layers/mlp/up/kernel", "F D -> D F"),
        row(f"{LAYER}ffn_down.weight", "layers/mlp/down/kernel", "D F -> F D"),
    ]
    if not config.tied_head:
        rows.append(row("output.weight", "lm_head/kernel", "V D -> D V"))
    return Table(tuple(rows), ignored=(FREQUENCIES,))


def config_from_fields(fields: Mapping[str, Any], source: Source) -> DecoderConfig:
    """The metadata of a file -> ours.

    Raises:
      PublishedError: a model of another kind, or metadata that is missing.
    """
    if (kind := fields.get("general.architecture")) != "llama":
        raise PublishedError(f"general.architecture is {kind!r}; only 'llama' is implemented")
    if missing := [name for name in REQUIRED if f"llama.{name}" not in fields]:
        raise PublishedError(f"the metadata have no {', '.join(f'llama.{name}' for name in missing)}")
    of = lambda name, default=None: fields.get(f"llama.{name}", default)
    width, heads = of("embedding_length"), of("attention.head_count")
    head_width = of("attention.key_length", width // heads)
    for name, expected in (
        ("attention.value_length", head_width),
        ("rope.dimension_count", head_width),
        ("rope.scale_linear", 1.0),
        ("expert_count", 0),
    ):
        if (value := of(name, expected)) != expected:
            raise PublishedError(f"llama.{name}={value}; only {expected} is implemented")
    block = BlockConfig(
        width=width,
        heads=heads,
        kv_heads=of("attention.head_count_kv", heads),
        head_width=head_width,
        mlp_width=of("feed_forward_length"),
        activation="silu",
        gated_mlp=True,
        norm=NormConfig(kind="rms", eps=of("attention.layer_norm_rms_epsilon")),
        qkv_bias=False,
        out_bias=False,
        mlp_bias=False,
    )
    return DecoderConfig(
        vocab_size=source.tensors["token_embd.weight"].shape[0],
        layers=of("block_count"),
        block=block,
        positions=RopeConfig(base=float(of("rope.freq_base", 10_000.0)), scaling=_scaling(of, source)),
        max_positions=of("context_length"),
        window=of("attention.sliding_window") or None,
        tied_head="output.weight" not in source.tensors,
    )


REQUIRED = (
    "block_count",
    "context_length",
    "embedding_length",
    "feed_forward_length",
    "attention.head_count",
    "attention.layer_norm_rms_epsilon",
)


def _scaling(of: Any, source: Source) -> LinearScaling | LongRopeScaling | None:
    if FREQUENCIES in source.tensors:
        # LLaMA 3.1's scaling, written out as a divisor of every frequency.
        factors = tuple(source.read(FREQUENCIES, (slice(0, source.tensors[FREQUENCIES].shape[0]),)).tolist())
        return LongRopeScaling(
            short_factors=factors, long_factors=factors, original_max_positions=of("context_length"), attention_factor=1.0
        )
    kind = of("rope.scaling.type", "none")
    if kind not in ("none", "linear"):
        raise PublishedError(f"llama.rope.scaling.type={kind!r}; only none and linear are implemented")
    if kind == "linear" and (factor := of("rope.scaling.factor")) is None:
        raise PublishedError("the metadata have no llama.rope.scaling.factor")
    return LinearScaling(factor=float(factor)) if kind == "linear" else None
