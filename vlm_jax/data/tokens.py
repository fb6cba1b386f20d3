"""All texts of a data set as token ids, made in one pass at the start and kept as a few flat arrays."""

from __future__ import annotations

import dataclasses
import logging
import re
import time

import numpy as np

from vlm_jax.config import SampleRule
from vlm_jax.data.encode import Laid, lay_out, media_of, visual_of
from vlm_jax.data.example import DataError, Example, Sequence, Source, Text
from vlm_jax.data.packing import Lengths
from vlm_jax.data.tokenizer import Tokenizer

log = logging.getLogger(__name__)

CHUNK = 512  # examples whose texts are tokenised in one call
REPORT_S = 10.0  # seconds between progress lines


@dataclasses.dataclass(frozen=True)
class Tokens:
    """N sequences of E examples. Only token ids and what is learned are kept; the rest follows from them."""

    ids: np.ndarray  # flat, uint16 or int32
    learned: np.ndarray  # flat, bool
    offsets: np.ndarray  # [N + 1] int64
    first_slot: np.ndarray  # [N] int32, of the sequence's images within its example
    example: np.ndarray  # [N] int32
    images: np.ndarray  # [E] int32
    share: np.ndarray  # [N] float32, the chance to be in an epoch
    image_id: int
    picture: int  # how many `<image>` stand for a picture
    skipped: int  # examples left out because they fit in no row

    @property
    def lengths(self) -> Lengths:
        """What packing plans with. The last token of a sequence is only a target and takes no place in a row."""
        share = None if np.all(self.share == 1) else self.share
        return Lengths((np.diff(self.offsets) - 1).astype(np.int32), self.example, self.images, share)

    def write(self, sequences: np.ndarray, slots: np.ndarray, row: dict[str, np.ndarray]) -> None:
        """Writes sequences into a row, one after the other.

        Args:
          sequences: [n] indices.
          slots: [n] how many image slots of the row come before those of the sequence's example.
          row: arrays [T], the fields of Batch without its B axis, zero.
        """
        begins = self.offsets[sequences]
        sizes = self.offsets[sequences + 1] - begins - 1
        ends = np.cumsum(sizes)
        starts, total = ends - sizes, int(ends[-1])
        place = np.arange(total)
        here = np.repeat(begins - starts, sizes) + place
        row["tokens"][:total] = self.ids[here]
        row["targets"][:total] = self.ids[here + 1]
        row["weights"][:total] = self.learned[here + 1]
        row["positions"][:total] = place - np.repeat(starts, sizes)
        row["segments"][:total] = np.repeat(np.arange(1, len(sizes) + 1), sizes)
        last, first = media_of(row["tokens"][:total], self.image_id, sizes, self.first_slot[sequences] + slots, self.picture)
        row["media_last"][:total] = last
        row["media_first"][:total] = first
        if "visual" in row:
            row["visual"][:total] = visual_of(row["tokens"][:total], self.image_id, last, self.picture)


def tokenize(
    source: Source,
    tokenizer: Tokenizer,
    tokens: int,
    images: int,
    frames: int,
    sampling: tuple[SampleRule, ...] = (),
    picture: int = 1,
    skip: bool = False,
) -> Tokens:
    """Tokenises every text of the source.

    Args:
      tokens, images, frames: T, M and F of a row.
      sampling: which sequences are seen less often.
      picture: how many `<image>` stand for one.
      skip: leave out, count and report examples that no row can take, instead of raising.

    Raises:
      DataError: an example has no sequence, or needs more tokens, images or frames than there are; a sampling rule that is
        no regex or whose share is no chance.
    """
    rules = [_compiled(rule) for rule in sampling]
    ids: list[np.ndarray] = []
    learned: list[np.ndarray] = []
    sizes: list[int] = []
    first_slot: list[int] = []
    of_example: list[int] = []
    shares: list[float] = []
    pictures = np.zeros(len(source), np.int32)
    refused: list[str] = []
    kind = np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.int32
    began = reported = time.perf_counter()
    for start in range(0, len(source), CHUNK):
        examples = [source[index] for index in range(start, min(start + CHUNK, len(source)))]
        laid = iter(lay_out([one for example in examples for one in example.sequences], tokenizer, picture=picture))
        for index, example in enumerate(examples, start):
            own = [next(laid) for _ in example.sequences]
            problem = _problem(example, own, tokens, images, frames)
            if problem and not skip:
                raise DataError(f"{example.id}: {problem}")
            if problem:
                refused.append(f"{example.id}: {problem}")
                continue
            pictures[index] = len(example.images)
            for one, sequence in zip(own, example.sequences, strict=True):
                ids.append(np.asarray(one.tokens, kind))
                learned.append(np.asarray(one.learned, bool))
                sizes.append(len(one.tokens))
                first_slot.append(one.first_slot)
                of_example.append(index)
                shares.append(_share(sequence, rules))
        if time.perf_counter() - reported > REPORT_S:
            reported = time.perf_counter()
            log.info("tokenising: %d of %d examples, %.0f s", start + len(examples), len(source), reported - began)
    if refused:
        log.warning("%d of %d examples fit in no row and are left out; the first: %s", len(refused), len(source), refused[0])
    if not sizes:
        raise DataError("the data set holds no example to learn from")
    return Tokens(
        np.concatenate(ids),
        np.concatenate(learned),
        np.cumsum([0, *sizes], dtype=np.int64),
        np.asarray(first_slot, np.int32),
        np.asarray(of_example, np.int32),
        pictures,
        np.asarray(shares, np.float32),
        tokenizer.image_id,
        picture,
        len(refused),
    )


def _compiled(rule: SampleRule) -> tuple[re.Pattern[str], float]:
    try:
        pattern = re.compile(rule.pattern)
    except re.error as error:
        raise DataError(f"data.sampling: pattern {rule.pattern!r}: {error}") from error
    if not 0 < rule.share <= 1:
        raise DataError(f"data.sampling: share {rule.share} of {rule.pattern!r}: expected above 0 and at most 1")
    return pattern, rule.share


def _share(sequence: Sequence, rules: list[tuple[re.Pattern[str], float]]) -> float:
    text = "".join(part.text for part in sequence if isinstance(part, Text))
    return next((share for pattern, share in rules if pattern.search(text)), 1.0)


def _problem(example: Example, laid: list[Laid], tokens: int, images: int, frames: int) -> str:
    if not laid:
        return "has no text"
    longest = max(len(one.tokens) - 1 for one in laid)
    if longest > tokens:
        return f"a sequence of {longest} tokens, and a row has data.tokens={tokens}. Raise it or shorten the text"
    if len(example.images) > images:
        return f"{len(example.images)} images, and a row has data.images={images}. Raise it"
    most = max((len(slot) for slot in example.images), default=0)
    if most > frames:
        return f"an image slot of {most} frames, and a slot has data.frames={frames}. Raise it"
    return ""
