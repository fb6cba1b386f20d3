"""Flamingo's ablations (Alayrac et al. 2022): table 3, and table 10 of its appendix, at 4 shots."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from vlm_jax.ablations.table import TABLES, Change, Kit, Row, Table, changed, of_fields, unchanged
from vlm_jax.config import ParamRule, ResidualMlpConfig, RunConfig, TransformerResamplerConfig

# The best results without Flamingo's, which its overall score divides by.
STATE_OF_THE_ART = {"COCO": 143.3, "OKVQA": 54.4, "VQAv2": 80.2, "MSVDQA": 47.9, "VATEX": 76.3}
COLUMNS = tuple(STATE_OF_THE_ART)


def overall(scores: Mapping[str, float]) -> float:
    """100 times the mean share of the best earlier result."""
    return 100 * sum(scores[name] / best for name, best in STATE_OF_THE_ART.items()) / len(STATE_OF_THE_ART)


def _without(*names: str) -> Change:
    """Some of the accumulated sets are left out."""
    return lambda run, kit: dataclasses.replace(run, accumulated=tuple(one for one in run.accumulated if one.name not in names))


def _without_own(run: RunConfig, kit: Kit) -> RunConfig:
    """The run's own data, M3W, are left out: the first accumulated set takes their place, with its weight as 1."""
    first, *rest = run.accumulated
    scaled = tuple(dataclasses.replace(one, weight=one.weight / first.weight) for one in rest)
    return dataclasses.replace(run, data=first.data, accumulated=scaled)


def _grafting(run: RunConfig, kit: Kit) -> RunConfig:
    """New language layers behind the frozen ones, each with cross-attention in it; the head stays the frozen model's."""
    layers = kit.frozen_layers
    run = changed(run, "model.language", layers=layers + kit.grafted_layers)
    run = changed(run, "model.fusion", every=1, offset=0, start=layers, place="within", mlp_width=0)
    new = ParamRule(pattern="^language/layers", rows_from=layers)
    deeper = lambda part: changed(part, "", new_layers=kit.grafted_layers) if part.part == "language" else part
    run = dataclasses.replace(run, init_parts=tuple(map(deeper, run.init_parts)))
    return changed(run, "optimizer", rules=(new, *run.optimizer.rules))


def _single(run: RunConfig, kit: Kit) -> RunConfig:
    layers = run.model.language.layers
    return changed(run, "model.fusion", every=layers, offset=layers // 2)


def _every(times: int) -> Change:
    """A gated layer in the place of so many of the baseline's."""
    return lambda run, kit: changed(run, "model.fusion", every=times * run.model.fusion.every)


def _mlp(run: RunConfig, kit: Kit) -> RunConfig:
    old = run.model.connector
    shared = dict(mlp_ratio=old.mlp_ratio, activation=old.activation, norm=old.norm, time_embeddings=old.time_embeddings)
    return changed(run, "model", connector=ResidualMlpConfig(layers=kit.mlp_layers, **shared))


def _transformer(run: RunConfig, kit: Kit) -> RunConfig:
    old = run.model.connector
    names = ("latents", "layers", "heads", "head_width", "mlp_ratio", "activation", "norm", "time_embeddings")
    return changed(run, "model", connector=TransformerResamplerConfig(**{name: getattr(old, name) for name in names}))


def _resampler(size: str) -> Change:
    return lambda run, kit: changed(run, "model.connector", **kit.resamplers[size])


def _encoder(role: str) -> Change:
    """Another vision encoder, and what it starts from."""

    def change(run: RunConfig, kit: Kit) -> RunConfig:
        vision, start = kit.encoders[role]
        parts = tuple(part for part in run.init_parts if part.part != "vision") + ((start,) if start else ())
        run = dataclasses.replace(changed(run, "model", vision=vision), init_parts=parts)
        sets = tuple(changed(one, "data", image_size=vision.image_size) for one in run.accumulated)
        return changed(dataclasses.replace(run, accumulated=sets), "data", image_size=vision.image_size)

    return change


def _trained(part: str, *, pretrained: bool) -> Change:
    """A part that the baseline keeps frozen is trained with the rest."""

    def change(run: RunConfig, kit: Kit) -> RunConfig:
        kept = tuple(rule for rule in run.optimizer.rules if not rule.pattern.startswith(f"^{part}"))
        parts = tuple(one for one in run.init_parts if pretrained or one.part != part)
        return dataclasses.replace(changed(run, "optimizer", rules=kept), init_parts=parts)

    return change


def _both(*changes: Change) -> Change:
    def change(run: RunConfig, kit: Kit) -> RunConfig:
        for one in changes:
            run = one(run, kit)
        return run

    return change


def _row(name: str, group: str, setting: str, to: str, change: Change, *numbers: float) -> Row:
    """
    Args:
      numbers: parameters in billions, seconds a step, the five scores and the overall one.
    """
    published = dict(zip(("parameters", "step", *COLUMNS, "overall"), numbers, strict=True))
    return Row(name=name, group=group, setting=setting, changed=to, change=change, published=published)


DATA, OPTIMISATION = "training data (all)", "optimisation (accumulation)"
TABLE_3 = (
    _row("baseline", "", "Flamingo-3B", "baseline", unchanged, 3.2, 1.74, 86.5, 42.1, 55.8, 36.3, 53.4, 70.7),
    _row("no-video", "(i)", DATA, "w/o Video-Text", _without("vtp"), 3.2, 1.42, 84.2, 43.0, 53.9, 34.5, 46.0, 67.3),
    _row("no-pairs", "(i)", DATA, "w/o Image-Text", _without("align", "ltip"), 3.2, 0.95, 66.3, 39.2, 51.6, 32.0, 41.6, 60.9),
    _row("laion", "(i)", DATA, "Image-Text -> LAION", unchanged, 3.2, 1.74, 79.5, 41.4, 53.5, 33.9, 47.6, 66.4),
    _row("no-m3w", "(i)", DATA, "w/o M3W", _without_own, 3.2, 1.02, 54.1, 36.5, 52.7, 31.4, 23.5, 53.4),
    _row(
        "round-robin",
        "(ii)",
        OPTIMISATION,
        "round robin",
        of_fields("", sets="round_robin"),
        *(3.2, 1.68, 76.1, 39.8, 52.1, 33.2, 40.8, 62.9),
    ),
    _row(
        "no-gating",
        "(iii)",
        "tanh gating (yes)",
        "no",
        of_fields("model.fusion", gating="none"),
        *(3.2, 1.74, 78.4, 40.5, 52.9, 35.9, 47.5, 66.5),
    ),
    _row(
        "vanilla",
        "(iv)",
        "cross-attention (gated xattn-dense)",
        "vanilla xattn",
        of_fields("model.fusion", place="within", mlp_width=0),
        *(2.4, 1.16, 80.6, 41.5, 53.4, 32.9, 50.7, 66.9),
    ),
    _row(
        "grafting",
        "(iv)",
        "cross-attention (gated xattn-dense)",
        "grafting",
        _grafting,
        *(3.3, 1.74, 79.2, 36.1, 50.8, 32.2, 47.8, 63.1),
    ),
    _row(
        "single",
        "(v)",
        "cross-attention frequency (every)",
        "single in the middle",
        _single,
        *(2.0, 0.87, 71.5, 38.1, 50.2, 29.1, 42.3, 59.8),
    ),
    _row(
        "every-4th",
        "(v)",
        "cross-attention frequency (every)",
        "every 4th",
        _every(4),
        *(2.3, 1.02, 82.3, 42.7, 55.1, 34.6, 50.8, 68.8),
    ),
    _row(
        "every-2nd",
        "(v)",
        "cross-attention frequency (every)",
        "every 2nd",
        _every(2),
        *(2.6, 1.24, 83.7, 41.0, 55.8, 34.5, 49.7, 68.2),
    ),
    _row("mlp", "(vi)", "resampler (Perceiver)", "MLP", _mlp, 3.2, 1.85, 78.6, 42.2, 54.7, 35.2, 44.7, 66.6),
    _row(
        "transformer",
        "(vi)",
        "resampler (Perceiver)",
        "Transformer",
        _transformer,
        *(3.2, 1.81, 83.2, 41.7, 55.6, 31.5, 48.3, 66.7),
    ),
    _row(
        "clip",
        "(vii)",
        "vision encoder (NFNet-F6)",
        "CLIP ViT-L/14",
        _encoder("other"),
        *(3.1, 1.58, 76.5, 41.6, 53.4, 33.2, 44.5, 64.9),
    ),
    _row(
        "small-encoder",
        "(vii)",
        "vision encoder (NFNet-F6)",
        "NFNet-F0",
        _encoder("small"),
        *(2.9, 1.45, 73.8, 40.5, 52.8, 31.1, 42.9, 62.7),
    ),
    _row(
        "lm-random",
        "(viii)",
        "LM frozen (yes)",
        "no, random init",
        _trained("language", pretrained=False),
        *(3.2, 2.42, 74.8, 31.5, 45.6, 26.9, 50.1, 57.8),
    ),
    _row(
        "lm-trained",
        "(viii)",
        "LM frozen (yes)",
        "no, pretrained",
        _trained("language", pretrained=True),
        *(3.2, 2.42, 81.2, 33.7, 47.4, 31.0, 53.9, 62.7),
    ),
)
SIZE, NEXT = "resampler size (medium)", "p_next (0.5)"
TABLE_10 = (
    _row("resampler-small", "10", SIZE, "small", _resampler("small"), 3.1, 1.58, 81.1, 40.4, 54.1, 36.0, 50.2, 67.9),
    _row("resampler-large", "10", SIZE, "large", _resampler("large"), 3.4, 1.87, 84.4, 42.2, 54.4, 35.1, 51.4, 69.0),
    _row(
        "all-previous",
        "10",
        "multi-image attention (only last)",
        "all previous",
        of_fields("model.fusion", media="all_previous"),
        *(3.2, 1.74, 70.0, 40.9, 52.0, 32.1, 46.8, 63.5),
    ),
    _row("p-next-0", "10", NEXT, "0.0", of_fields("data", next_image=0.0), 3.2, 1.74, 85.0, 41.6, 55.2, 36.7, 50.6, 69.6),
    _row("p-next-1", "10", NEXT, "1.0", of_fields("data", next_image=1.0), 3.2, 1.74, 81.3, 43.3, 55.6, 36.8, 52.7, 70.4),
    _row(
        "vision-random",
        "10",
        "vision encoder frozen (yes)",
        "no, random init",
        _trained("vision", pretrained=False),
        *(3.2, 4.70, 74.5, 41.6, 52.7, 31.4, 35.8, 61.4),
    ),
    _row(
        "vision-trained",
        "10",
        "vision encoder frozen (yes)",
        "no, pretrained",
        _trained("vision", pretrained=True),
        *(3.2, 4.70, 83.5, 40.6, 55.1, 34.6, 50.7, 68.1),
    ),
    _row(
        "laion-only",
        "10",
        "public data and weights",
        "LAION-400M alone, CLIP ViT-L/14",
        _both(_without_own, _without("ltip", "vtp"), _encoder("other")),
        *(3.1, 0.86, 61.4, 37.9, 50.9, 27.9, 29.7, 54.7),
    ),
    _row(
        "m3w-laion-vtp",
        "10",
        "public data and weights",
        "M3W, LAION-400M and VTP, CLIP ViT-L/14",
        _both(_without("ltip"), _encoder("other")),
        *(3.1, 1.58, 76.3, 41.5, 53.4, 32.5, 46.1, 64.9),
    ),
)
TABLES.add("flamingo")(
    Table(
        name="flamingo",
        paper="Flamingo (Alayrac et al. 2022), tables 3 and 10",
        columns=COLUMNS,
        rows=TABLE_3 + TABLE_10,
        overall=overall,
    )
)
