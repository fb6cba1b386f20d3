"""Published checkpoints' own processing: transformers' tokenizer, chat template and picture processor, without PyTorch.

Pictures leave it as bytes: rescaling and normalising are left to the vision encoder, which has the mean and the deviation.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from collections.abc import Sequence as Many
from pathlib import Path
from typing import Any

import numpy as np

from vlm_jax.data.example import ImageAt, Text
from vlm_jax.generation.processor import Layout
from vlm_jax.generation.request import MARKER, Picture, Request, RequestError, Settings, Shot, array_of, marked
from vlm_jax.interop.source import PublishedError

Size = tuple[int, int]  # height, width
Wrapped = Any  # transformers' processor, or its tokenizer


@dataclasses.dataclass(frozen=True)
class Pictures:
    """How a family's pictures stand in the text."""

    token: str  # stands for one visual token
    places: Callable[[Size], np.ndarray]  # of a picture of this size, which visual tokens stand in its place; see `Layout`
    written: Callable[[int], str] | None = None  # what so many of them are as text; None: that many tokens
    finished: Callable[[str], str] = lambda text: text  # the whole text, once its pictures are written


def squared(image: np.ndarray, background: tuple[int, int, int]) -> np.ndarray:
    """[H, W, 3] -> [S, S, 3] with S the longer side, in the middle of it (LLaVA's `expand2square`)."""
    height, width, _ = image.shape
    side = max(height, width)
    square = np.full((side, side, 3), background, np.uint8)
    top, left = (side - height) // 2, (side - width) // 2
    square[top : top + height, left : left + width] = image
    return square


def picture_bytes(processor: Any, image: np.ndarray) -> np.ndarray:
    """What transformers' picture processor makes of a picture [H, W, 3], not rescaled and not normalised: [F, H, W, 3] uint8.

    Raises:
      PublishedError: it gives numbers of another type.
    """
    return np.stack(raw_pictures(processor, image, return_tensors="np"))


def raw_pictures(processor: Any, image: np.ndarray, **settings: Any) -> list[np.ndarray]:
    """`picture_bytes` of tiles that may differ in size."""
    made = processor(image, do_rescale=False, do_normalize=False, **settings)["pixel_values"][0]
    tiles = made if isinstance(made, list) or np.ndim(made) == 4 else [made]
    wrong = {tile.dtype for tile in tiles} - {np.dtype(np.uint8)}
    if wrong:
        raise PublishedError(f"{type(processor).__name__} gives {wrong.pop()}, expected uint8")
    return [tile.transpose(1, 2, 0) for tile in tiles]


def check_tokenizer(folder: Path, tokenizer: Any) -> None:
    """
    Raises:
      PublishedError: it was read from a folder that has none; transformers makes an empty one then, which reads nothing.
    """
    if not hasattr(tokenizer, "vocab_files_names"):
        return  # a picture processor alone
    files = {"tokenizer.json", *tokenizer.vocab_files_names.values()}
    if not any((folder / name).is_file() for name in files):
        raise PublishedError(f"{folder} holds no tokenizer: expected one of {', '.join(sorted(files))}; fetch it again")


class PublishedTokenizer:
    """transformers' tokenizer as the generator uses it."""

    def __init__(self, wrapped: Any) -> None:
        self.wrapped = wrapped

    def encode(self, text: str) -> list[int]:
        return self.wrapped.encode(text, add_special_tokens=False)

    def decode(self, ids: list[int], special: bool = True) -> str:
        return self.wrapped.decode(ids, skip_special_tokens=not special)

    def whole(self, text: str) -> list[int]:
        """The ids of a whole prompt, with the begin token unless the text has it already, as a chat template writes it."""
        begin = self.wrapped.bos_token
        return self.wrapped(text, add_special_tokens=not (begin and text.startswith(begin)))["input_ids"]


class PublishedProcessor:
    """Of a published checkpoint whose pictures, if it sees, stand in the sequence.

    Attributes:
      wrapped: transformers' processor, or its tokenizer alone for a language model.
    """

    blind = False
    # The colour with which pictures are first padded to squares, centred, as LLaVA-1.5 was evaluated by its authors; None: they
    # are not, as transformers' checkpoints of it have it.
    background: tuple[int, int, int] | None = None

    def __init__(self, wrapped: Wrapped, ends: set[int], defaults: Settings, pictures: Pictures | None = None) -> None:
        self.wrapped, self.ends, self.defaults, self.pictures = wrapped, ends, defaults, pictures
        self.tokenizer = PublishedTokenizer(getattr(wrapped, "tokenizer", wrapped))
        self.pad_id = next((i for i in (self.tokenizer.wrapped.pad_token_id, *sorted(ends)) if i is not None), 0)

    def ask(self, prompt: str, images: Many[Picture] = (), shots: Many[Shot] = (), seed: int | None = None) -> Request:
        """In the checkpoint's chat template, solved examples as turns before the question.

        A base model, without a template, reads the prompt as it is, and a line "question answer" for every example before.

        Raises:
          RequestError: another number of pictures than of markers.
        """
        turns = [(f"example {n}", shot.question, list(shot.images), shot.answer) for n, shot in enumerate(shots, 1)]
        turns.append(("the prompt", prompt, list(images), None))
        messages, text, slots = [], "", []
        for name, question, pictures, answer in turns:
            pieces = marked(name, question, len(pictures)).split(MARKER)
            slots += pictures
            text += self._token.join(pieces) + ("" if answer is None else f" {answer}\n")
            messages.append({"role": "user", "content": self._content(pieces)})
            if answer is not None:
                messages.append({"role": "assistant", "content": self._content([answer])})
        if getattr(self.wrapped, "chat_template", None):
            text = self.wrapped.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        return self.request(text, slots, seed)

    def request(self, text: str, images: Many[Picture] = (), seed: int | None = None) -> Request:
        """A text that holds the checkpoint's own picture token in the place of every picture, and is read as it is.

        Raises:
          RequestError: another number of pictures than of tokens.
        """
        if images and not self.pictures:
            raise RequestError("the request has pictures, but this model is a language model alone: leave them out")
        pieces = text.split(self._token) if self.pictures else [text]
        if len(pieces) - 1 != len(images):
            raise RequestError(
                f"the text has {len(pieces) - 1} times {self._token!r} and there are {len(images)} pictures: give one for each"
            )
        parts: list[Text | ImageAt] = [Text(pieces[0], learn=False)]
        for slot, piece in enumerate(pieces[1:]):
            parts += [ImageAt(slot), Text(piece, learn=False)]
        film = lambda image: tuple(image) if isinstance(image, list | tuple) else (image,)
        return Request(tuple(parts), tuple(map(film, images)), seed)

    def lay_out(self, request: Request) -> Layout:
        """
        Raises:
          RequestError: a slot of several pictures, or text that changes when pictures are put into it.
        """
        text, slots, offsets = "", [], []
        for part in request.parts:
            if isinstance(part, Text):
                text += part.text
                continue
            places = self.pictures.places(self._one(request.images[part.slot]).shape[:2])
            count = len(places)
            text += self.pictures.written(count) if self.pictures.written else self.pictures.token * count
            slots.append(np.full(len(places), part.slot + 1))
            offsets.append(places)
        text = self.pictures.finished(text) if self.pictures else text
        tokens = np.asarray(self.tokenizer.whole(text), np.int32)
        nothing = np.zeros(len(tokens), np.int32)
        laid = Layout(tokens, nothing, nothing, nothing.copy(), nothing.copy())
        if slots:
            stands = tokens == self.tokenizer.wrapped.convert_tokens_to_ids(self.pictures.token)
            if stands.sum() != sum(map(len, offsets)):
                raise RequestError(
                    f"the tokenizer gives {stands.sum()} picture tokens where the pictures need {sum(map(len, offsets))}: "
                    f"is {self.pictures.token!r} one of its special tokens?"
                )
            laid.slots[stands], laid.offsets[stands] = np.concatenate(slots), np.concatenate(offsets)
        return laid

    def pixels(self, film: tuple[Picture, ...]) -> np.ndarray:
        """A picture's tiles: [F, H, W, 3] uint8."""
        image = self._one(film)
        return picture_bytes(self.wrapped.image_processor, image)

    def allowed(self, vocabulary: int) -> np.ndarray:
        return np.ones(vocabulary, bool)

    @property
    def _token(self) -> str:
        return self.pictures.token if self.pictures else MARKER

    def _content(self, pieces: list[str]) -> Any:
        """A turn's content in the form chat templates read: of a language model alone, just the text."""
        if not self.pictures:
            return MARKER.join(pieces)
        content: list[dict[str, str]] = []
        for number, piece in enumerate(pieces):
            content += [{"type": "image"}] * bool(number) + ([{"type": "text", "text": piece}] if piece else [])
        return content

    def _one(self, film: tuple[Picture, ...]) -> np.ndarray:
        if len(film) != 1:
            raise RequestError(f"a film of {len(film)} pictures: this checkpoint reads single pictures. Give them one by one")
        array = array_of(film[0], on_white=False)
        return array if self.background is None else squared(array, self.background)
