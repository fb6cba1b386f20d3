"""What a user asks: a conversation with its media, and the seed of its answer."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence as Many
from pathlib import Path
from typing import Any

from vlm_jax.errors import RequestError
from vlm_jax.files import JsonError, parse_json, read_regular
from vlm_jax.processing.conversation import (
    Conversation,
    Media,
    Medium,
    Text,
    Turn,
    as_media,
    from_messages,
    media_of,
    written_out,
)
from vlm_jax.processing.pictures import Picture, Size, picture_size


@dataclasses.dataclass(frozen=True, slots=True)
class Request:
    """A conversation that is to be gone on with."""

    turns: Conversation
    media: Media = ()
    seed: int | None = None  # of its samples, together with `Settings.seed`; None: its number among the requests

    @property
    def ordered(self) -> Media:
        """The media in the order of their places."""
        return tuple(self.media[index] for index in media_of(self.turns))

    @property
    def sizes(self) -> list[Size]:
        """Of these, from the headers of their files.

        Raises:
          ImageError: one cannot be read.
        """
        return [picture_size(medium[0]) for medium in self.ordered]


def interleaved(parts: Many[str | Picture | tuple[Picture, ...]], seed: int | None = None) -> Request:
    """Texts and pictures as they come, read as they are: `[picture, "a cat", picture, "a"]`.

    Args:
      parts: a str is text; a Path, bytes, an array or a PIL image is a picture, a tuple of them a video.
    """
    content: list[Text | Medium] = []
    media = []
    for part in parts:
        if isinstance(part, str):
            content.append(Text(part))
        else:
            content.append(Medium(len(media)))
            media.append(part)
    return Request((Turn("text", tuple(content)),), as_media(media), seed)


def verbatim(text: str, image_token: str, images: Many[Picture] = (), *, seed: int | None = None) -> Request:
    """A text that is read as it is, the checkpoint's own picture token in the place of every picture.

    Raises:
      RequestError: another number of pictures than of tokens.
    """
    return Request(written_out(text, image_token, len(images)), as_media(images), seed)


def chat_request(messages: Any, root: Path | None = None, *, seed: int | None = None) -> Request:
    """A chat, as `conversation.from_messages` describes it, that the assistant is to go on with.

    Args:
      root: where relative paths of pictures begin; None: at the working directory.

    Raises:
      RequestError: a wrong message, or nothing to answer.
    """
    turns, media = from_messages(messages, root)
    if turns[-1].role == "assistant":
        raise RequestError("the last message is the assistant's, so there is nothing to answer: end with the user's")
    return Request(turns, media, seed)


def chat_file(path: Path) -> Request:
    """A JSON file that holds a chat; paths of its pictures are relative to it.

    Raises:
      RequestError: what is wrong with it.
    """
    try:
        return chat_request(parse_json(read_regular(path)), path.parent)
    except OSError as error:
        raise RequestError(f"--messages={path}: {error.strerror}") from error
    except (JsonError, RequestError) as error:
        raise RequestError(f"{path}: {error}") from None
