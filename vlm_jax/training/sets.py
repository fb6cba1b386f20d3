"""The data sets of a run: its own, those that are accumulated beside it, and their held-out parts."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from vlm_jax.batch import Batch
from vlm_jax.config import AugmentConfig, RunConfig
from vlm_jax.config.mixture import check_named
from vlm_jax.data.example import Source
from vlm_jax.data.features import FeatureStore
from vlm_jax.data.pipeline import TrainBatches, build_source, check_same, tokens_of
from vlm_jax.data.store import TokenStore
from vlm_jax.processing.processor import Processor
from vlm_jax.training.features import features_of
from vlm_jax.training.objective import OBJECTIVES, in_set
from vlm_jax.training.processors import TOKENIZER, build_processor, run_processor
from vlm_jax.training.step import Batches, Trainer, TrainState, taken_sets

SAME = ("processor", "template", "pad_to_square", "tokenizer", "vocab_size", "end")  # in all sets of a run


@dataclasses.dataclass(frozen=True, kw_only=True)
class HeldOut:
    """What an evaluation reads."""

    source: Source
    features: FeatureStore | None = None  # in the place of pixels


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataSet:
    """A set of a run, opened."""

    name: str  # "": the run's own
    config: RunConfig  # with the set's data as its `data`
    processor: Processor
    source: Source
    held_out: Source | None  # None: it is not evaluated
    held_out_parts: dict[str, HeldOut]  # by the name of its metrics: the set, or of a mixture SET/MEMBER each
    stores: dict[str, TokenStore]  # by split, "NAME/train"
    features: FeatureStore | None = None  # of `source`, in the place of pixels


def check_data(config: RunConfig) -> None:
    """Checks that the data are prepared as the model and the objective read them.

    Raises:
      ValueError: it does not; the message says what to set.
    """
    model, data = config.model, config.data
    needed = model.visual_tokens_in_sequence
    if data.visual_tokens != needed:
        how = (
            f"has {needed} visual tokens of a tile in the sequence" if needed else "reads pictures by cross-attention, or none"
        )
        raise ValueError(f"config.data.visual_tokens={data.visual_tokens}: the model {how}: set it to {needed}")
    if data.keep_shapes != model.reads_shapes:
        raise ValueError(f"config.data.keep_shapes={data.keep_shapes}: this vision encoder needs {model.reads_shapes}")
    side = model.vision.image_size if needed and not data.keep_shapes else data.image_size
    if needed and (data.image_size, data.frames) != (side, 1):
        raise ValueError(f"visual tokens in the sequence: set config.data.image_size={side} and frames=1")
    if data.processor and (data.augment != AugmentConfig() or data.blank_images):
        raise ValueError("config.data.augment and blank_images are for recipes: config.data.processor makes its own pixels")
    if data.share_prefix and data.layout == "pair":
        raise ValueError("config.data.share_prefix: a pair of an image and its caption has a row of its own: set it to False")
    if data.share_prefix and model.has_vision and model.fusion.prefix_lm:
        raise ValueError("config.data.share_prefix: in a prefix-LM the images see the question behind them: set it to False")
    if data.share_prefix and model.language.positions.by_length:
        raise ValueError("config.data.share_prefix: these rotary positions depend on a sequence's length: set it to False")
    if data.share_prefix and data.next_image:
        raise ValueError("config.data.share_prefix: next_image is drawn for each sequence: set one of them to its default")
    if data.pairs and data.source.members:
        raise ValueError("config.data.pairs: pairs of answers are of one source, not of a mixture: write them into one file")
    for name in ("next_image", "leading_space"):
        if not 0 <= getattr(data, name) <= 1:
            raise ValueError(f"config.data.{name}={getattr(data, name)}: expected a probability, from 0 to 1")
    if data.next_image and needed:
        raise ValueError("config.data.next_image is for cross-attention: visual tokens in the sequence stand where they stand")
    if data.processor and (data.learned != "all" or data.leading_space):
        raise ValueError("config.data.learned and leading_space are for recipes: config.data.processor has its own template")
    if data.pad_to_square and not data.processor:
        raise ValueError("config.data.pad_to_square is for config.data.processor; a recipe has config.data.image_fit")
    if data.template and not data.processor:
        raise ValueError("config.data.template is for config.data.processor; a recipe has config.data.prompt and answer")
    pairs = OBJECTIVES[type(config.objective)].reads_pairs
    if data.pairs != pairs:
        raise ValueError(f"config.data.pairs={data.pairs}: the objective {config.objective.kind!r} needs {pairs}")


def check_sets(config: RunConfig) -> None:
    """Checks what can be known of the sets before they are opened.

    Raises:
      ValueError: names, weights, or what must be the same in all sets; pictures prepared otherwise than the model reads them.
    """
    check_data(config)
    check_named(config.accumulated, "config.accumulated")
    for one in config.accumulated:
        where = f"config.accumulated.{one.name}"
        if one.every < 1 or (one.every > 1 and config.sets == "round_robin"):
            raise ValueError(f"{where}.every={one.every}: expected 1 or more, and 1 where config.sets='round_robin'")
        for field in SAME:
            found, expected = getattr(one.data, field), getattr(config.data, field)
            if found != expected:
                raise ValueError(f"{where}.data.{field}={found!r}: the sets of a run share it; config.data has {expected!r}")
        try:
            check_data(dataclasses.replace(config, data=one.data))
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error


def open_sets(config: RunConfig, folder: Path) -> list[DataSet]:
    """All sets of a run, the run's own first. A tokenizer that is trained reads the texts of that one.

    Args:
      folder: of the run, which keeps the processor.

    Raises:
      DataError: data that cannot be read or are not right; ValueError: a tokenizer larger than the model's vocabulary.
    """
    opened: list[DataSet] = []
    for one in config.data_sets:
        source = build_source(one.data, "train")
        held_out = build_source(one.data, "eval") if one.evaluate else None
        if opened:
            processor = run_processor(one.data, folder)
        else:
            processor = build_processor(one.data, source, folder, pickles=config.pickles)
            known, needed = config.model.language.vocab_size, processor.tokenizer.vocab_size
            if needed > known:
                raise ValueError(f"config.model.language.vocab_size={known} is less than the tokenizer's {needed}")
            _check_tokenizer(config, processor)
        stores = {}
        for split, of_split in {"train": source, "eval": held_out}.items():
            if of_split is not None:
                store = tokens_of(one.data, processor, of_split)
                check_same(store)
                stores[in_set(one.name, split)] = store
        opened.append(
            DataSet(
                name=one.name,
                config=dataclasses.replace(config, data=one.data),
                processor=processor,
                source=source,
                held_out=held_out,
                held_out_parts={name: HeldOut(source=part) for name, part in _parts(one.name, held_out).items()},
                stores=stores,
            )
        )
    return opened


def _check_tokenizer(config: RunConfig, processor: Processor) -> None:
    """
    Raises:
      ValueError: the run that `config.init_from` names was trained with another tokenizer, so that its embeddings mean others.
    """
    before = Path(config.init_from).expanduser()
    if not config.init_from or config.data.processor or not (before / TOKENIZER / "tokenizer.json").is_file():
        return
    written = lambda processor: processor.tokenizer.hf_tokenizer.backend_tokenizer.to_str()
    if written(run_processor(config.data, before)) != written(processor):
        raise ValueError(
            f"config.data.tokenizer={config.data.tokenizer}: config.init_from={config.init_from} was trained with another "
            f"tokenizer: set config.data.tokenizer={before / TOKENIZER}"
        )


def _parts(name: str, held_out: Source | None) -> dict[str, Source]:
    if held_out is None:
        return {}
    members = getattr(held_out, "members", {})
    if len(members) < 2:
        return {name: held_out}
    return {in_set(name, member): source for member, source in members.items()}


def evaluated(config: RunConfig) -> list[str]:
    """The names in the metrics of evaluations: "" of the run's own set, those of the others, and of the members of mixtures."""
    names: list[str] = []
    for one in config.data_sets:
        if one.evaluate:
            members = [in_set(one.name, member.name) for member in one.data.source.members if member.evaluate]
            names += [one.name, *(members if len(members) > 1 else [])]
    return names


def with_features(one: DataSet, trainer: Trainer, state: TrainState) -> DataSet:
    """The set with the features of its pictures in the place of pixels.

    Raises:
      DataError: as `features_of`.
    """
    of = lambda source: features_of(trainer, state, source, processor=one.processor, data=one.config.data)
    parts = {name: HeldOut(source=part.source, features=of(part.source)) for name, part in one.held_out_parts.items()}
    return dataclasses.replace(one, features=of(one.source), held_out_parts=parts)


def train_batches(config: RunConfig, sets: list[DataSet], *, start: int, **process: int) -> TrainBatches | SetBatches:
    """What a run trains on from step `start` on, to be closed.

    Args:
      process: `process_index` and `process_count`, as in TrainBatches.
    """
    if len(sets) == 1:
        (own,) = sets
        return TrainBatches(config, own.processor, own.source, start=start, features=own.features, **process)
    return SetBatches(config, sets, start=start, **process)


class SetBatches:
    """A batch of each set that an update takes (`taken_sets`). It goes on at any step, as TrainBatches does."""

    def __init__(self, config: RunConfig, sets: list[DataSet], *, start: int, **process: int) -> None:
        self.position, self._steps, self._taken = start, config.steps, taken_sets(config)
        self._batches: list[TrainBatches] = []
        for number, one in enumerate(sets):
            of_set = dataclasses.replace(one.config, steps=self._before(config.steps, number))
            arguments: dict[str, Any] = dict(start=self._before(start, number), features=one.features, **process)
            self._batches.append(TrainBatches(of_set, one.processor, one.source, **arguments))

    def _before(self, step: int, number: int) -> int:
        """How many batches of a set come before a step."""
        whole, rest = divmod(step, len(self._taken))
        of = [taken[number] for taken in self._taken]
        return whole * sum(of) + sum(of[:rest])

    def __iter__(self) -> SetBatches:
        return self

    def __next__(self) -> Batches:
        """
        Raises:
          DataError: a picture cannot be read; it names the example.
        """
        if self.position >= self._steps:
            raise StopIteration
        taken = self._taken[self.position % len(self._taken)]
        made: tuple[Batch | None, ...] = tuple(
            next(batches) if is_taken else None for batches, is_taken in zip(self._batches, taken, strict=True)
        )
        self.position += 1
        return made

    @property
    def left_out(self) -> int:
        """As of TrainBatches, of all sets."""
        return sum(batches.left_out for batches in self._batches)

    def close(self) -> None:
        for batches in self._batches:
            batches.close()
