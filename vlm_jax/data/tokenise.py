"""Examples -> the arrays of a token store: measures media, tokenises conversations, finds examples that do not fit."""

from __future__ import annotations

import dataclasses
import functools
import re

import numpy as np

from vlm_jax.config import DataConfig, SampleRule
from vlm_jax.data.example import Example, Source
from vlm_jax.data.packing import uniform
from vlm_jax.errors import DataError, RequestError
from vlm_jax.processing.conversation import Conversation, Medium, Text, media_of, plain_text
from vlm_jax.processing.layout import ENDS, LEARNED, TokenizedConversation
from vlm_jax.processing.pictures import ImageError, Picture, Size, file_bytes, picture_size
from vlm_jax.processing.processor import Processor

SPACE = 6  # a number of its own among those that are hashed
KNOWN_PICTURES = 4096  # files that are remembered while a store is made

Written = tuple[Conversation, TokenizedConversation, int, bool]  # its length in a row, and whether it was cut


@dataclasses.dataclass
class Chunk:
    """Some examples, one after the other."""

    fields: dict[str, list]  # of `store.FIELDS`: values, or arrays to be joined
    problems: list[str]  # of examples that were left out
    dropped: int = 0  # turns that were left out
    cut: int = 0  # conversations that were cut where the row ends

    @classmethod
    def empty(cls) -> Chunk:
        from vlm_jax.data.store import FIELDS

        return cls({field: [] for field in FIELDS}, [])


class DatasetTokenizer:
    """Tokenises the examples of a data set. It pickles: the worker processes get a copy."""

    def __init__(self, source: Source, processor: Processor, config: DataConfig) -> None:
        """
        Raises:
          DataError: a sampling rule that is not a regex, or whose share is not a probability.
        """
        self.source, self.processor, self.config = source, processor, config
        self.rules = [_compiled(rule) for rule in config.sampling]
        self._known = functools.lru_cache(KNOWN_PICTURES)(self._look_at)

    def __reduce__(self):
        return type(self), (self.source, self.processor, self.config)

    def chunk(self, indices: range, *, skip: bool) -> Chunk:
        """
        Args:
          skip: leave out and report examples that are wrong or do not fit into a row; else the first ends the chunk.
        """
        out = Chunk.empty()
        for index in indices:
            slots = media = 0
            try:
                example = self.source[index]
                sizes, of_files, found = self._measured(example)
                if self.config.leading_space:
                    found = tuple(_spaced(turns, uniform(SPACE, index) < self.config.leading_space) for turns in found)
                rows = [self._written(example, turns, sizes) for turns in found]
                rows = self._whole_pairs(example, rows) if self.config.pairs else rows
                # Media used only by dropped turns take no slot.
                sizes = sizes[: max((place + 1 for turns, *_ in rows for place in media_of(turns)), default=0)]
                slots, media = self._slots(sizes), len(sizes)
                self._check_example(example, slots, media)
                out.dropped += sum(map(len, found)) - sum(len(kept) for kept, *_ in rows)
                out.cut += sum(cut for *_, cut in rows)
                shared = self._shared(rows) if self.config.share_prefix and rows else 0
                for turns, written, length, _ in rows:
                    self._add(out, index, turns, written, length, shared=shared)
                out.fields["sizes"].append(np.asarray(sizes, np.int32).reshape(-1))
                out.fields["file_bytes"].append(np.asarray(of_files[:media], np.int64))
            except (DataError, RequestError, ImageError) as error:
                out.problems.append(str(error))
                if not skip:
                    return out
                slots = media = 0
            out.fields["slots"].append(slots)
            out.fields["example_media"].append(media)
        return out

    @property
    def _in_sequence(self) -> bool:
        return self.processor.media.tile_tokens > 0

    def _slots(self, sizes: list[Size]) -> int:
        return sum(self.processor.media.tiles(size) for size in sizes) if self._in_sequence else len(sizes)

    def _measured(self, example: Example) -> tuple[list[Size], list[int], tuple[Conversation, ...]]:
        """The sizes of its media, from the headers of all their files, and the bytes of these."""
        sizes, of_files = [], []
        for medium in example.media:
            try:
                of_frames = [self._looked_at(frame) for frame in medium]
            except ImageError as error:
                raise DataError(f"{example.id}: {error}") from None
            sizes.append(of_frames[0][0])
            of_files.append(sum(length for _, length in of_frames))
        if not example.conversations:
            raise DataError(f"{example.id}: has no text")
        if example.pairs != self.config.pairs:
            is_one = "is a pair of a chosen and a rejected answer" if example.pairs else "has no chosen and rejected answer"
            kind = "preference" if example.pairs else "next_token"
            raise DataError(
                f"{example.id}: {is_one}, and data.pairs={self.config.pairs}: set config.data.pairs={example.pairs} and the "
                f"objective {kind!r}, or give other data"
            )
        for turns in example.conversations:
            places = media_of(turns)
            if places != list(range(places[0], places[0] + len(places)) if places else []):
                raise DataError(f"{example.id}: its media are used in the order {places}; expected consecutive ones")
        return sizes, of_files, example.conversations

    def _looked_at(self, picture: Picture) -> tuple[Size, int]:
        return self._known(picture) if isinstance(picture, str) else self._look_at(picture)

    def _look_at(self, picture: Picture) -> tuple[Size, int]:
        """Its size, and the bytes of its file."""
        size = picture_size(picture)
        if self.config.check_pictures:
            self.processor.media.pixels((picture,))
        return size, file_bytes(picture)

    def _written(self, example: Example, turns: Conversation, sizes: list[Size]) -> Written:
        """The tokenised conversation, its length in a row, and whether it was cut; without last turns if they are dropped."""
        drops = self.config.too_long == "drop_turns"
        while True:
            try:
                written = self.processor.write(turns)
            except RequestError as error:
                raise DataError(f"{example.id}: {error}") from error
            own = [sizes[place] for place in media_of(turns)]
            length = self._length(written, own)
            if self.config.pairs:
                return turns, written, length, False  # `_whole_pairs` looks at both halves together
            too_long, too_many = length > self.config.tokens, self._slots(own) > self.config.images
            if self.config.too_long == "truncate" and (too_long or too_many):
                return self._cut(example, turns, written, own)
            shorter = _without_last_pair(turns) if drops and (too_long or too_many) else None
            if shorter is None and not too_long:
                return turns, written, length, False
            if shorter is None:
                raise DataError(
                    f"{example.id}: a conversation of {length} tokens, and a row has data.tokens={self.config.tokens}. Raise "
                    "it, shorten the text, or leave out its last turns: data.too_long=drop_turns"
                    + (" (which was done, but the first is too long already)" if drops else "")
                )
            turns = shorter

    def _whole_pairs(self, example: Example, rows: list[Written]) -> list[Written]:
        """Those whose both halves fit into one row. Nothing is cut: an answer's end is part of what is preferred.

        Raises:
          DataError: one does not, and too_long="error".
        """
        kept: list[Written] = []
        shared = self._shared(rows) if self.config.share_prefix else 0
        for chosen, rejected in zip(rows[::2], rows[1::2], strict=True):
            if chosen[2] + rejected[2] - shared <= self.config.tokens:
                kept += [chosen, rejected]
            elif self.config.too_long == "error":
                raise DataError(
                    f"{example.id}: a chosen and a rejected answer of {chosen[2]} and {rejected[2]} tokens, each with its "
                    f"prompt, and a row, which takes both, has data.tokens={self.config.tokens}. Raise it, or leave such pairs "
                    "out: data.too_long=drop_turns"
                )
        return kept

    def _cut(self, example: Example, turns: Conversation, written: TokenizedConversation, sizes: list[Size]) -> Written:
        """What a row takes of a conversation from its beginning: no picture in part, and none behind the last slot.

        Raises:
          DataError: nothing of that is learned.
        """
        media = self.processor.media
        is_image = written.tokens == self.processor.spread.image_id
        runs = [[len(run) for run in media.runs(size)] if self._in_sequence else [1] for size in sizes]
        places = np.ones(len(written.tokens), np.int64)
        places[is_image] = [length for of in runs for length in of]
        # Of each medium, where its tokens begin and end among those that are written.
        ends = np.cumsum([len(of) for of in runs])
        at = np.append(np.flatnonzero(is_image), len(written.tokens))
        most = int(np.searchsorted(np.cumsum(places), self.config.tokens + 1, side="right"))
        whole = lambda count: self._slots(sizes[:count]) <= self.config.images and at[ends[count - 1] - 1] < most
        room = next((count for count in range(len(sizes)) if not whole(count + 1)), len(sizes))
        if room < len(sizes):
            most = min(most, int(at[ends[room] - len(runs[room])]))
        # What stands behind the last learned token changes nothing.
        learned = np.flatnonzero(written.flags[:most] & LEARNED)
        ended = np.flatnonzero(written.flags[: most - 1] & ENDS) + 1
        most = int(max(learned.max(initial=0), ended.max(initial=0))) + 1
        if most < 2:
            raise DataError(
                f"{example.id}: nothing is learned of the {self.config.tokens} tokens and {self.config.images} pictures that a "
                "row takes: raise data.tokens or data.images"
            )
        short = TokenizedConversation(written.tokens[:most], written.flags[:most])
        kept = sum(bool(at[end - 1] < most) for end in ends)
        return _with_media(turns, kept), short, self._length(short, sizes[:kept]), True

    def _length(self, written: TokenizedConversation, sizes: list[Size]) -> int:
        """Places in a row: the last token is only a target."""
        length = len(written.tokens) - 1
        if self._in_sequence:
            length += sum(len(run) - 1 for size in sizes for run in self.processor.media.runs(size))
        return length

    def _shared(self, rows: list[Written]) -> int:
        """How many places of a row an example's conversations begin with in common: all their images, or none of it."""
        turns, written, length, _ = rows[0]
        if len(rows) == 1 or any(media_of(others) != media_of(turns) for others, *_ in rows):
            return 0
        count = common_prefix([written for _, written, *_ in rows])
        if np.any(written.tokens[count:] == self.processor.spread.image_id):
            return 0
        # Behind the prefix the first conversation is text alone, of one place a token.
        return length - (len(written.tokens) - 1 - count)

    def _check_example(self, example: Example, slots: int, media: int) -> None:
        config = self.config
        if slots > config.images:
            what = "tiles of pictures" if self._in_sequence else "images"
            raise DataError(f"{example.id}: {slots} {what}, and a row has data.images={config.images}. Raise it")
        most = max((len(medium) for medium in example.media[:media]), default=0)
        if most > 1 and not self.processor.media.reads_videos:
            raise DataError(f"{example.id}: a video of {most} frames, and this model reads single pictures")
        if most > config.frames:
            raise DataError(
                f"{example.id}: an image slot of {most} frames, and a slot has data.frames={config.frames}. Raise it"
            )

    def _add(
        self, out: Chunk, index: int, turns: Conversation, written: TokenizedConversation, length: int, *, shared: int
    ) -> None:
        fields, media = out.fields, media_of(turns)
        fields["tokens"].append(written.tokens)
        fields["flags"].append(written.flags)
        fields["counts"].append(len(written.tokens))
        fields["lengths"].append(length)
        fields["shared"].append(shared)
        fields["example"].append(index)
        fields["first_medium"].append(media[0] if media else 0)
        fields["media"].append(len(media))
        fields["share"].append(self._share(turns))

    def _share(self, turns: Conversation) -> float:
        if not self.rules:
            return 1.0
        text = plain_text(turns)
        return next((share for pattern, share in self.rules if pattern.search(text)), 1.0)


def common_prefix(written: list[TokenizedConversation]) -> int:
    """How many tokens conversations begin with in common, none of which predicts a learned token."""
    shortest = min(len(one.tokens) for one in written)
    tokens, flags = (np.stack([getattr(one, name)[:shortest] for one in written]) for name in ("tokens", "flags"))
    # Of a token and what it predicts: the next one, or the end.
    learns = np.append((flags[0, 1:] & LEARNED) > 0, True) | ((flags[0] & ENDS) > 0)
    differs = np.any((tokens != tokens[0]) | (flags != flags[0]), axis=0) | learns
    return int(np.argmax(np.append(differs, True)))


def _with_media(turns: Conversation, count: int) -> Conversation:
    """With only the first of its media."""
    left = iter(range(len(media_of(turns))))
    kept = lambda part: not isinstance(part, Medium) or next(left) < count
    return tuple(dataclasses.replace(turn, content=tuple(filter(kept, turn.content))) for turn in turns)


def _spaced(turns: Conversation, space: bool) -> Conversation:
    """With a space before each learned text, or none."""
    begin = " " if space else ""
    return tuple(
        dataclasses.replace(turn, content=(Text(begin + turn.text.lstrip()),)) if turn.learn else turn for turn in turns
    )


def _without_last_pair(turns: Conversation) -> Conversation | None:
    """Without the last answer and its question; None: nothing would be left to learn."""
    shorter = turns[:-1]
    while shorter and not shorter[-1].learn:
        shorter = shorter[:-1]
    return shorter or None


def _compiled(rule: SampleRule) -> tuple[re.Pattern[str], float]:
    try:
        pattern = re.compile(rule.pattern)
    except re.error as error:
        raise DataError(f"data.sampling: pattern {rule.pattern!r}: {error}") from error
    if not 0 < rule.share <= 1:
        raise DataError(f"data.sampling: share {rule.share} of {rule.pattern!r}: expected above 0 and at most 1")
    return pattern, rule.share
