"""A conversation as tokens: first compact, each picture written as few `<image>` tokens, then spread to what the model reads.

    written    <s>  USER:  <image>  What  ?  ASSISTANT:  A  cat  </s>
    flags       P     P       P      P    P      P       L   L    L      (P of a prompt, L learned)
    spread     <s>  USER:  <image> <image> <image> <image>  What  ?  ...
    visual      0     0       1       2       3       4      0    0      (which visual token stands here)

The token store keeps the first form, the batch and the generator read the second. Training and inference make both with the
same functions.
"""

from __future__ import annotations

import dataclasses

import numpy as np

LEARNED = 1  # the model learns to say this token
ENDS = 2  # it learns to end after this token although the text continues: the template writes no end token here
PROMPT = 4  # the token belongs to a prompt, which a prefix-LM reads both ways

NEWLINE = -1  # in `places`: LLaVA-NeXT's newline token

Runs = tuple[np.ndarray, ...]  # of a medium, for each `<image>` written for it, the visual tokens that take its place


@dataclasses.dataclass(frozen=True, slots=True)
class TokenizedConversation:
    """A conversation tokenised once, without the sizes of its pictures."""

    tokens: np.ndarray  # [U] int32
    flags: np.ndarray  # [U] uint8, LEARNED, ENDS and PROMPT added up


@dataclasses.dataclass(frozen=True, slots=True)
class Layout:
    """A conversation as the model reads it. All arrays are [T]."""

    tokens: np.ndarray  # int32
    flags: np.ndarray  # uint8, as in `TokenizedConversation`
    # int32: the visual token that stands here, counted from 1 through the conversation's tiles; 0: text; NEWLINE
    visual: np.ndarray
    media_last: np.ndarray  # int32, the last medium the token may see by cross-attention, counted from 1; 0: none
    media_first: np.ndarray  # int32, the first medium of the conversation; 0: it has none

    @property
    def learned(self) -> np.ndarray:
        """[T] bool, whether the model learns to say the token."""
        return (self.flags & LEARNED) > 0

    @property
    def prefix(self) -> np.ndarray:
        """[T] bool, whether the token belongs to a prompt."""
        return (self.flags & PROMPT) > 0

    def __getitem__(self, places: slice) -> Layout:
        return Layout(*(getattr(self, field.name)[places] for field in dataclasses.fields(self)))

    def without_last(self) -> Layout:
        """Without the last token, which is only ever a target."""
        return self[:-1]

    def with_next_image(self) -> Layout:
        """Every token sees the medium after it instead of the last one, none behind the last (Alayrac et al. 2022, A.3.2).

        media_last 0,0,1,1,1,2,2,2 becomes 1,1,2,2,2,0,0,0.
        """
        most = self.media_last.max(initial=0)
        return dataclasses.replace(self, media_last=np.where(self.media_last < most, self.media_last + 1, 0).astype(np.int32))


def spread(
    written: TokenizedConversation,
    *,
    image_id: int,
    runs: list[Runs],
    tiles: list[int],
    tile_tokens: int,
    resets_at: int | None = None,
) -> Layout:
    """Puts the visual tokens into their places.

    Args:
      image_id: the token that stands for visual tokens.
      runs: of each medium, in the order of their places. Under cross-attention a medium is one token that stays as it is.
      tiles: of each medium, how many tiles it is cut into.
      tile_tokens: R; 0: the model reads its media by cross-attention.
      resets_at: a token after which no medium is seen until the next one (IDEFICS).
    """
    is_image = written.tokens == image_id
    last, first = visible(written.tokens, is_image, len(runs), resets_at)
    if not tile_tokens:
        return Layout(written.tokens, written.flags, np.zeros_like(written.tokens), last, first)
    before = np.cumsum([0, *tiles[:-1]]) * tile_tokens
    flat = [np.where(run == NEWLINE, NEWLINE, run + 1 + base) for base, of in zip(before, runs, strict=False) for run in of]
    counts = np.ones(len(written.tokens), np.int64)
    counts[is_image] = [len(run) for run in flat]
    repeat = lambda values: np.repeat(values, counts)
    visual = np.zeros(int(counts.sum()), np.int32)
    if flat:
        visual[repeat(is_image)] = np.concatenate(flat)
    return Layout(repeat(written.tokens), repeat(written.flags), visual, repeat(last), repeat(first))


def visible(tokens: np.ndarray, is_image: np.ndarray, media: int, resets_at: int | None) -> tuple[np.ndarray, np.ndarray]:
    """`media_last` and `media_first` of a conversation in which each medium is one token, which already counts itself.

    With `<image>` at places 2 and 5 of 8 tokens, media_last is 0,0,1,1,1,2,2,2.
    """
    last = np.cumsum(is_image).astype(np.int32)
    if resets_at is not None and len(tokens):
        place = np.arange(len(tokens))
        newest = lambda here: np.maximum.accumulate(np.where(here, place, -1))
        # The end token itself still sees; what follows it does not.
        ended = np.concatenate([[-1], newest(tokens == resets_at)[:-1]])
        last = np.where(ended > newest(is_image), 0, last)
    return last.astype(np.int32), np.full(len(tokens), int(media > 0), np.int32)


def prefix_ends(flags: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """The last position each token sees in a prefix-LM: the end of its own prompt, or itself.

    Each turn's prompt is a block that sees all of itself and what came before; answers are causal (big_vision's
    `make_attn_mask` with mask_ar = 0 within a prompt)::

        prompt      1 1 1 0 0 1 1 0
        positions   0 1 2 3 4 5 6 7
                    2 2 2 3 4 6 6 7

    Args:
      flags: [T] uint8 of sequences that stand one after the other.
      positions: [T] int32, from 0 in each sequence.
    """
    prompt = (flags & PROMPT) > 0
    follows = np.append(prompt[1:] & (positions[1:] > 0), False) if len(flags) else prompt
    goes_on = prompt & follows & ((flags & ENDS) == 0)
    place = np.arange(len(flags))
    # The next place, from here on, at which the block ends.
    end = np.minimum.accumulate(np.where(goes_on, len(flags), place)[::-1])[::-1] if len(flags) else place
    return positions + (end - place).astype(np.int32)


def targets_of(layout: Layout, end_id: int) -> tuple[np.ndarray, np.ndarray]:
    """What is predicted at each place of a closed layout but its last, which is only a target.

    Returns:
      targets [T - 1] int32, and the weights of these predictions in the loss [T - 1] float32.
    """
    ends = (layout.flags[:-1] & ENDS) > 0
    targets = np.where(ends, end_id, layout.tokens[1:]).astype(np.int32)
    return targets, (layout.learned[1:] | ends).astype(np.float32)
