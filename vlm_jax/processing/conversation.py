"""Conversations: turns of text and media, the same for a line of training data, a question and a chat.

    Conversation                                       media
    Turn("user", (Medium(0), Text("What is this?")))   [(street.jpg,)]
    Turn("assistant", (Text("A street."),))

A turn with role "text" is read as it is, without any template: a web page of text and pictures (Flamingo's M3W), or a prompt
that is written out. Such turns may follow one another; `learn` says which of them are learned.
"""

from __future__ import annotations

import base64
import dataclasses
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from vlm_jax.errors import RequestError, abbreviated, check_text, counted
from vlm_jax.processing.pictures import Picture
from vlm_jax.processing.video import sampled_frames

MARKER = "<image>"  # places a picture in a prompt or in a line of data
ROLES = ("system", "user", "assistant", "text")
IMAGE_KEYS = ("image", "path", "url", "image_url")  # where a message's picture may stand


@dataclasses.dataclass(frozen=True, slots=True)
class Text:
    """
    Raises:
      RequestError: a text that cannot be encoded.
    """

    text: str

    def __post_init__(self) -> None:
        check_text("a text", self.text)


@dataclasses.dataclass(frozen=True, slots=True)
class Medium:
    """The place of a picture or video."""

    index: int  # of the media that come with the conversation


@dataclasses.dataclass(frozen=True, slots=True)
class Turn:
    role: str  # "system", "user", "assistant", or "text"
    content: tuple[Text | Medium, ...]
    learn: bool = False  # whether the model learns to say it

    @property
    def text(self) -> str:
        """Its text without the media."""
        return "".join(part.text for part in self.content if isinstance(part, Text))


Conversation = tuple[Turn, ...]
Media = tuple[tuple[Picture, ...], ...]  # each of one picture, or of the frames of a video


@dataclasses.dataclass(frozen=True, slots=True)
class Shot:
    """A solved example that is shown before the question (few-shot, "in-context" learning)."""

    images: Sequence[Picture]
    question: str
    answer: str


def user(*content: Text | Medium) -> Turn:
    return Turn("user", content)


def assistant(text: str) -> Turn:
    return Turn("assistant", (Text(text),), learn=True)


def media_of(conversation: Conversation) -> list[int]:
    """The indices of its media, in the order of their places."""
    return [part.index for turn in conversation for part in turn.content if isinstance(part, Medium)]


def joined(parts: Sequence[tuple[Conversation, Media]]) -> tuple[Conversation, Media]:
    """Conversations, each with media of its own, one after the other as one."""
    turns: list[Turn] = []
    media: list[tuple[Picture, ...]] = []
    for conversation, own in parts:
        first = len(media)
        moved = lambda part, first=first: Medium(part.index + first) if isinstance(part, Medium) else part
        turns += [dataclasses.replace(turn, content=tuple(map(moved, turn.content))) for turn in conversation]
        media += own
    return tuple(turns), tuple(media)


def plain_text(conversation: Conversation) -> str:
    """The text of all turns, separated by single spaces."""
    return " ".join(text for turn in conversation if (text := turn.text.strip()))


def as_media(images: Sequence[Picture | Sequence[Picture]]) -> Media:
    """Pictures, or lists of a video's frames -> media.

    Raises:
      RequestError: one is no picture, or a video without frames.
    """
    media = []
    for number, image in enumerate(images, 1):
        frames = image if isinstance(image, list | tuple) else [image]
        if not frames:
            raise RequestError(f"image {number} is an empty list; expected the frames of a video")
        media.append(tuple(_picture(f"image {number}", frame) for frame in frames))
    return tuple(media)


def from_prompt(prompt: str, images: Sequence[Any] = (), shots: Sequence[Shot] = ()) -> tuple[Conversation, Media]:
    """A question with its pictures, after solved examples.

    The literal `<image>` places a picture; without it a turn's pictures come first.

    Raises:
      RequestError: another number of pictures than of markers.
    """
    turns: list[Turn] = []
    media: list[tuple[Picture, ...]] = []

    def ask(name: str, question: str, images: Sequence[Any]) -> None:
        if not isinstance(question, str):
            raise RequestError(f"{name} is {abbreviated(repr(question))}; expected a string")
        markers = question.count(MARKER)
        if markers and markers != len(images):
            raise RequestError(
                f"{name} has {counted(markers, MARKER + ' marker')} and {counted(len(images), 'image')}: "
                "give an image for every marker, or leave the markers out and all images come first"
            )
        turns.append(user(*content_of(question if markers else MARKER * len(images) + question, first=len(media))))
        media.extend(as_media(images))

    for number, shot in enumerate(shots, 1):
        ask(f"example {number}", shot.question, shot.images)
        if not isinstance(shot.answer, str):
            raise RequestError(f"the answer of example {number} is {abbreviated(repr(shot.answer))}; expected a string")
        turns.append(assistant(shot.answer))
    ask("the prompt", prompt, images)
    return tuple(turns), tuple(media)


def content_of(text: str, first: int = 0, *, image_first: bool = False) -> tuple[Text | Medium, ...]:
    """A text in which `<image>` places pictures -> content, its media counted from `first`.

    White space beside leading markers is dropped.

    Args:
      image_first: put the image of a single marker before the text: LLaVA's data has it before or after the question and
        means the same.
    """
    if image_first and text.count(MARKER) == 1:
        rest = re.sub(rf"\s*{MARKER}\s*", " ", text).strip()
        return (Medium(first), Text(rest)) if rest else (Medium(first),)
    leading = re.match(rf"(\s*{MARKER})*", text).group()
    count = leading.count(MARKER)
    pieces = text[len(leading) :].strip().split(MARKER) if count else text.split(MARKER)
    content: list[Text | Medium] = [Medium(first + number) for number in range(count)]
    for number, piece in enumerate(pieces):
        if number:
            content.append(Medium(first + count + number - 1))
        if piece:
            content.append(Text(piece))
    return tuple(content)


def written_out(text: str, image_token: str, images: int) -> Conversation:
    """A text that is written out, with the checkpoint's own token in the place of every picture.

    Raises:
      RequestError: another number of pictures than of tokens.
    """
    pieces = text.split(image_token) if image_token else [text]
    if len(pieces) - 1 != images:
        raise RequestError(
            f"the text has {len(pieces) - 1} times {image_token!r} and there are {images} pictures: give one for each"
        )
    content: list[Text | Medium] = [Text(pieces[0])]
    for slot, piece in enumerate(pieces[1:]):
        content += [Medium(slot), Text(piece)]
    return (Turn("text", tuple(part for part in content if not isinstance(part, Text) or part.text)),)


def from_messages(
    messages: Any, root: Path | None = None, *, video: Callable[[str], tuple[Picture, ...]] = sampled_frames
) -> tuple[Conversation, Media]:
    """An OpenAI-style list of messages -> turns and media.

        [{"role": "user", "content": [{"type": "image", "image": "a.jpg"}, {"type": "text", "text": "What is this?"}]},
         {"role": "assistant", "content": "A cat."},
         {"role": "user", "content": "Which colour?"}]

    A picture stands under "image", "path", "url" or OpenAI's "image_url"; it is a file, its bytes, a PIL image or an array. A
    video is {"type": "video", "video": "a.mp4"}, or {"type": "video", "frames": [...]}.

    Args:
      root: where relative paths begin; None: at the working directory.
      video: the frames that are read of a video's file.

    Raises:
      RequestError: which message is wrong, and how.
    """
    if not isinstance(messages, list | tuple) or not messages:
        raise RequestError(f"messages: expected a list of messages, found {abbreviated(repr(messages))}")
    turns: list[Turn] = []
    media: list[tuple[Picture, ...]] = []
    for number, message in enumerate(messages, 1):
        where = f"message {number}"
        if not isinstance(message, dict) or "role" not in message or "content" not in message:
            raise RequestError(f"{where} is {abbreviated(repr(message))}; expected an object with 'role' and 'content'")
        role, content = message["role"], message["content"]
        if role not in ROLES[:3]:
            raise RequestError(f"{where} has the role {role!r}; expected 'system', 'user' or 'assistant'")
        if isinstance(content, str):
            content = [{"type": "text", "text": content}]
        if not isinstance(content, list | tuple):
            raise RequestError(f"{where}: 'content' is {abbreviated(repr(content))}; expected a string or a list of parts")
        sampled = lambda path: video(path if root is None else str(root / path))
        parts = [_part(f"{where}, part {place}", part, media, sampled) for place, part in enumerate(content, 1)]
        turns.append(Turn(role, tuple(parts), learn=role == "assistant"))
    if root is not None:
        media = [tuple(str(root / one) if isinstance(one, str) else one for one in medium) for medium in media]
    return tuple(turns), tuple(media)


def _part(where: str, part: Any, media: list[tuple[Picture, ...]], video: Callable[[str], Any]) -> Text | Medium:
    if not isinstance(part, dict):
        raise RequestError(f"{where} is {abbreviated(repr(part))}; expected an object with 'type'")
    kind = part.get("type", "text" if "text" in part else "image" if set(part) & set(IMAGE_KEYS) else None)
    if kind == "text":
        if not isinstance(part.get("text"), str):
            raise RequestError(f"{where}: 'text' is {abbreviated(repr(part.get('text')))}; expected a string")
        check_text(f"{where}: 'text'", part["text"])
        return Text(part["text"])
    if kind in ("image", "image_url"):
        found = next((part[key] for key in IMAGE_KEYS if key in part), None)
        found = found.get("url") if isinstance(found, dict) else found
        if found is None:
            raise RequestError(f"{where} has no picture: expected it under 'image', a file's path for example")
        media.append((_picture(where, found),))
    elif kind == "video" and isinstance(part.get("frames"), list | tuple) and part["frames"]:
        media.append(tuple(_picture(where, frame) for frame in part["frames"]))
    elif kind == "video" and isinstance(part.get("video"), str):
        media.append(video(part["video"]))
    else:
        raise RequestError(
            f"{where} is {abbreviated(repr(part))}; expected 'type': 'text' or 'image', or 'video' with 'video' or 'frames'"
        )
    return Medium(len(media) - 1)


def _picture(where: str, found: Any) -> Picture:
    if not isinstance(found, Picture):
        raise RequestError(
            f"{where}: a picture is {abbreviated(repr(found))}; expected a file's path, its bytes, a PIL image or an array"
        )
    if isinstance(found, str) and found.startswith("data:"):  # OpenAI's inline images
        try:
            return base64.b64decode(found.partition("base64,")[2], validate=True)
        except ValueError:
            raise RequestError(f"{where}: {found[:40]}... is not an image in base64") from None
    if isinstance(found, str) and found.startswith(("http://", "https://")):
        raise RequestError(f"{where}: {found[:60]} is an address; fetch the picture first and give its path")
    return found
