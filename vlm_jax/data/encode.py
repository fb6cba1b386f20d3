"""A sequence of text and pictures -> token ids, which image each token sees, and what is learned.

Flamingo's layout (Alayrac et al. 2022, section 3.1): `<BOS>`, then text, with an `<image>` token at each picture's place.
`<EOC>`, "end of chunk", closes each learned text, whatever follows, and the sequence; it is learned with the text it
closes, because saying it is how a model stops::

    parts      ImageAt(0)  Text("Q?")  Text(" red", learn)  ImageAt(1)  Text("Q?")  Text(" no", learn)
    tokens     <BOS>  <image>  Q  ?  red  <EOC>  <image>  Q  ?  no  <EOC>
    inputs     <BOS>  <image>  Q  ?  red  <EOC>  <image>  Q  ?  no              (all but the last)
    targets    <image>  Q  ?  red  <EOC>  <image>  Q  ?  no  <EOC>              (all but the first)
    weights      0      0  0   1    1       0      0  0  1    1
    media_last   0      1  1   1    1       1      2  2  2    2

Where visual tokens stand in the sequence itself (LLaVA), a picture is as many `<image>` as it has visual tokens.

Axis letter: T tokens of the sequence.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from vlm_jax.data.example import DataError, ImageAt, Sequence, Text
from vlm_jax.data.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True, slots=True)
class Laid:
    """A sequence as one run of tokens, from which everything else follows."""

    tokens: list[int]  # `<BOS>` first, `<EOC>` last
    learned: list[bool]  # of each token
    first_slot: int  # of its images, 0 if it has none


@dataclasses.dataclass(frozen=True, slots=True)
class Encoded:
    """What a row of a batch holds of one sequence. All arrays are [T]."""

    tokens: np.ndarray  # int32
    media_last: np.ndarray  # int32, the example's image slots counted from 1; 0: none yet
    media_first: np.ndarray  # int32, 0: no images at all
    targets: np.ndarray  # int32
    weights: np.ndarray  # float32


def lay_out(sequences: list[Sequence], tokenizer: Tokenizer, name: str = "sequence", picture: int = 1) -> list[Laid]:
    """Tokens of the sequences, all texts tokenised in one call.

    Args:
      name: what messages call the example.
      picture: how many `<image>` stand for one.

    Raises:
      DataError: a sequence whose image slots are not consecutive.
    """
    texts = list({part.text for sequence in sequences for part in sequence if isinstance(part, Text)})
    ids = dict(zip(texts, tokenizer.encode_batch(texts), strict=True))
    return [_lay_out(sequence, ids, tokenizer, name, picture) for sequence in sequences]


def _lay_out(
    sequence: Sequence, ids: dict[str, list[int]], tokenizer: Tokenizer, name: str, picture: int, close: bool = True
) -> Laid:
    tokens, learned, slots = [tokenizer.bos_id], [False], []
    learning = False

    def end_chunk(force: bool = False) -> None:
        if learning or force:
            tokens.append(tokenizer.eoc_id)
            learned.append(learning)

    for part in sequence:
        if isinstance(part, ImageAt):
            end_chunk()
            learning = False
            slots.append(part.slot)
            tokens += [tokenizer.image_id] * picture
            learned += [False] * picture
        else:
            if not part.learn:
                end_chunk()
            learning = part.learn
            tokens += ids[part.text]
            learned += [part.learn] * len(ids[part.text])
    if close:
        end_chunk(force=True)
    if slots != list(range(slots[0], slots[0] + len(slots)) if slots else []):
        raise DataError(f"{name}: its images are used in the order {slots}; expected consecutive slots")
    return Laid(tokens, learned, slots[0] if slots else 0)


def media_of(
    tokens: np.ndarray,
    image_id: int,
    sizes: np.ndarray | list[int],
    first_slots: np.ndarray | list[int],
    picture: int = 1,
) -> tuple[np.ndarray, np.ndarray]:
    """`media_last` and `media_first` of sequences that stand one after the other.

    An `<image>` token already counts its own image. One sequence with `<image>` at places 2 and 5 of 8, `first_slots` [0]:
    media_last is 0,0,1,1,1,2,2,2.

    Args:
      tokens: [T] int, of all sequences.
      sizes: tokens of each sequence, at least 1.
      first_slots: the slot of each sequence's first image, counted from 0.
      picture: how many `<image>` stand for one.

    Returns:
      two [T] int32, slots counted from 1, 0 for none.
    """
    sizes, first_slots = np.asarray(sizes), np.asarray(first_slots)
    is_image = tokens == image_id
    count = np.cumsum(is_image)
    ends = np.cumsum(sizes)
    before = count[ends - sizes] - is_image[ends - sizes]
    seen = -(-(count - np.repeat(before, sizes)) // picture)
    last = np.where(seen > 0, seen + np.repeat(first_slots, sizes), 0)
    first = np.repeat(np.where(seen[ends - 1] > 0, first_slots + 1, 0), sizes)
    return last.astype(np.int32), first.astype(np.int32)


def visual_of(tokens: np.ndarray, image_id: int, media_last: np.ndarray, picture: int) -> np.ndarray:
    """Which of the row's visual tokens stands at each place, counted from 1, 0 for text: [T] int32 (`layers/in_sequence.py`).

    Args:
      media_last: of `media_of`; every slot has `picture` visual tokens.
    """
    is_image = tokens == image_id
    # Each picture's tokens stand together, so their number in the whole tells their number in the picture.
    offset = (np.cumsum(is_image) - 1) % picture
    return np.where(is_image, (media_last - 1) * picture + offset + 1, 0).astype(np.int32)


def encode_sequence(sequence: Sequence, tokenizer: Tokenizer, name: str = "sequence") -> Encoded:
    """The rows' share of one sequence, T = its tokens less one: the last token is only ever a target.

    Raises:
      DataError: its image slots are not consecutive.
    """
    laid = lay_out([sequence], tokenizer, name)[0]
    tokens = np.asarray(laid.tokens, np.int32)
    last, first = media_of(tokens[:-1], tokenizer.image_id, [len(tokens) - 1], [laid.first_slot])
    return Encoded(tokens[:-1], last, first, tokens[1:], np.asarray(laid.learned[1:], np.float32))


def prompt_tokens(parts: Sequence, tokenizer: Tokenizer, picture: int = 1) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A prompt to be gone on with: laid out the same way, without the closing `<EOC>`.

    Args:
      picture: how many `<image>` stand for one.

    Returns:
      tokens, media_last, media_first: [T] int32.

    Raises:
      DataError: its image slots are not consecutive.
    """
    texts = [part.text for part in parts if isinstance(part, Text)]
    ids = dict(zip(texts, tokenizer.encode_batch(texts), strict=True))
    laid = _lay_out(parts, ids, tokenizer, "prompt", picture, close=False)
    tokens = np.asarray(laid.tokens, np.int32)
    last, first = media_of(tokens, tokenizer.image_id, [len(tokens)], [laid.first_slot], picture)
    return tokens, last, first
