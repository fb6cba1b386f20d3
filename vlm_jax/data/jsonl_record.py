"""A record of a JSON-lines file -> Example. The formats are described in `jsonl.py`."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from vlm_jax.data.documents import as_content
from vlm_jax.data.example import Example
from vlm_jax.data.preference_record import answer_alone, picture_bytes, sides_of
from vlm_jax.errors import RecordError, as_json, check_text
from vlm_jax.processing.conversation import (
    IMAGE_KEYS,
    MARKER,
    Medium,
    Text,
    Turn,
    assistant,
    content_of,
    from_messages,
    user,
)
from vlm_jax.processing.pictures import Picture
from vlm_jax.processing.video import VideoFrame

KINDS = ("conversations", "messages", "content")
HUMAN, GPT = ("human", "user"), ("gpt", "assistant")
PICTURES, VIDEOS = ("image", "images"), ("video", "videos")
VIDEO_MARKER = "<video>"
# Keys under which other formats name what is to be seen: a record that has one would be trained without it.
MISTAKEN = re.compile(
    r"(image|img|picture|pic|photo|video|frame|media)s?([_-]?(file|path|name|url|list|\d+)s?)?", re.IGNORECASE
)


def _take(record: dict, key: str, kind: type, default: Any = ...) -> Any:
    value = record.get(key, default)
    if value is ...:
        raise RecordError(f"has no {key!r}")
    if value is not default and not isinstance(value, kind):
        names = {str: "a string", list: "a list", bool: "true or false"}
        raise RecordError(f"{key!r} is {as_json(value)}; expected {names[kind]}")
    if kind is str:
        check_text(repr(key), value)
    return value


def _objects(values: Any) -> list[dict[str, Any]]:
    """The objects of a list; what else there is, is refused elsewhere."""
    return [value for value in values if isinstance(value, dict)] if isinstance(values, list) else []


Video = Callable[[str], tuple[Picture, ...]]  # a file's path -> the frames that are read


class Record:
    """One parsed JSON value on its way to an Example."""

    def __init__(self, where: str, record: Any, picture: Callable[[Any], Picture], video: Video | None = None):
        if not isinstance(record, dict):
            raise RecordError(f"is {as_json(record)}; expected an object")
        self._where, self._record, self._picture = where, as_content(record), picture
        self._video = video
        self._media: list[tuple[Picture, ...]] = []

    def example(self) -> Example:
        """Raises RecordError; RequestError: messages or a text that no model could be asked with."""
        sides = sides_of(self._record)
        if sides is not None:
            chosen, rejected = (Record(self._where, side, self._picture).example() for side in sides)
            answers = tuple(answer_alone(side.conversations[0]) for side in (chosen, rejected))
            return Example(self._where, chosen.media, answers, pairs=True)
        kinds = [key for key in KINDS if key in self._record]
        if len(kinds) != 1:
            names = ", ".join(map(repr, KINDS))
            raise RecordError(f"has the keys {sorted(self._record)}; expected one of {names}")
        self._check_keys(kinds[0])
        read = {"conversations": self._conversation, "messages": self._messages, "content": self._interleaved}[kinds[0]]
        turns = read()
        if not any(turn.learn for turn in turns):
            raise RecordError('has nothing to learn: no text of gpt or the assistant, or no text with "learn": true')
        return Example(self._where, tuple(self._media), (tuple(turns),))

    def _check_keys(self, kind: str) -> None:
        taken = {"content": (), "messages": PICTURES}.get(kind, (*PICTURES, *VIDEOS))
        for key, value in self._record.items():
            if MISTAKEN.fullmatch(key) and key not in taken and value:
                expected = "parts of 'content'" if not taken else "'image' or 'images'"
                raise RecordError(f"has the key {key!r}, which is not read; expected its pictures in {expected}")
        turns = [turn for kind in KINDS[:2] for turn in _objects(self._record.get(kind))]
        texts = [part for turn in turns for part in _objects(turn.get("content")) if part.get("type") == "text"]
        for name, items in {"turn": turns, "text": texts}.items():
            for key in (key for item in items for key, value in item.items() if MISTAKEN.fullmatch(key) and value):
                raise RecordError(
                    f"has a {name} with the key {key!r}, which is not read there; expected its pictures in parts "
                    "of a message, or in 'image' beside the conversation"
                )

    def _pictures(self) -> list[Any]:
        """Of `image` or `images`: one path, or a list of them."""
        given = [self._record[key] for key in PICTURES if self._record.get(key) is not None]
        if len(given) > 1:
            raise RecordError("has 'image' and 'images'; expected one of them")
        return [picture_bytes(path) for found in given for path in (found if isinstance(found, list) else [found])]

    def _next_medium(self, paths: Any) -> Medium:
        self._media.append(tuple(path if isinstance(path, bytes | VideoFrame) else self._picture(path) for path in paths))
        return Medium(len(self._media) - 1)

    def _sampled(self, path: Any) -> tuple[Picture, ...]:
        """The frames that are read of a video's file."""
        if self._video is None:
            raise RecordError(f"has the video {as_json(path)}; this source has pictures alone")
        return self._video(self._picture(path))

    def _videos(self) -> list[Any]:
        """Of `video` or `videos`: one path, or a list of them."""
        given = [self._record[key] for key in VIDEOS if self._record.get(key)]
        if len(given) > 1 or (given and self._pictures()):
            raise RecordError("has 'video' beside 'videos' or pictures; expected one of them. Write it as messages")
        return [path for found in given for path in (found if isinstance(found, list) else [found])]

    def _conversation(self) -> list[Turn]:
        said = _take(self._record, "conversations", list)
        # An answer before the first question, in conversations that were cut out of longer ones, is no turn for LLaVA either.
        led = len(said) > 1 and isinstance(said[0], dict) and said[0].get("from") in GPT
        videos = self._videos()
        media = [self._sampled(path) for path in videos] or [[path] for path in self._pictures()]
        turns: list[Turn] = []
        values: list[tuple[str, str]] = []
        for number, turn in enumerate(said[led:], 1 + led):
            if not isinstance(turn, dict):
                raise RecordError(f"turn {number} is {as_json(turn)}; expected an object of 'from' and 'value'")
            speaker, value = _take(turn, "from", str), _take(turn, "value", str)
            if speaker == "system" and number == 1:
                turns.append(Turn("system", (Text(value),)))
                continue
            expected = GPT if len(values) % 2 else HUMAN
            if speaker not in expected:
                raise RecordError(f"turn {number} is from {speaker!r}; expected {expected[0]!r}: they take turns, human first")
            values.append((expected[0], value.replace(VIDEO_MARKER, MARKER) if videos else value))
        if any(MARKER in value for speaker, value in values if speaker == GPT[0]):
            raise RecordError(f"{MARKER} in a turn of gpt; pictures belong to human turns")
        markers = sum(value.count(MARKER) for _, value in values)
        if values and not markers:
            values[0] = (values[0][0], MARKER * len(media) + values[0][1])
        elif markers != len(media):
            what = "videos" if videos else "pictures"
            raise RecordError(f"{markers} times {MARKER} and {len(media)} {what}; expected equally many")
        for frames in media:
            self._next_medium(frames)
        before = 0
        for speaker, value in values:
            if speaker == GPT[0]:
                turns.append(assistant(value.strip()))
            else:
                turns.append(user(*content_of(value.strip(), before, image_first=True)))
                before += value.count(MARKER)
        return turns

    def _messages(self) -> list[Turn]:
        turns, media = from_messages(self._with_pictures(_take(self._record, "messages", list)), video=self._sampled)
        for paths in media:
            self._next_medium(paths)
        return list(turns)

    def _with_pictures(self, messages: list[Any]) -> list[Any]:
        """The messages, with the record's pictures in the parts that name none."""
        paths = self._pictures()
        if not paths:
            return messages
        parts = [part for message in _objects(messages) for part in _objects(message.get("content"))]
        places = [part for part in parts if part.get("type") == "image" and not part.keys() & set(IMAGE_KEYS)]
        if len(places) != len(paths):
            raise RecordError(
                f"{len(places)} parts of type 'image' without a path, and {len(paths)} pictures; expected equally many"
            )
        for part, path in zip(places, paths, strict=True):
            part["image"] = path
        return messages

    def _interleaved(self) -> list[Turn]:
        turns: list[Turn] = []
        for number, part in enumerate(_take(self._record, "content", list), 1):
            if not isinstance(part, dict):
                raise RecordError(f"part {number} is {as_json(part)}; expected an object")
            kinds = [key for key in ("text", "image", "frames", "video") if key in part]
            unknown = set(part) - {"text", "image", "frames", "video", "learn"}
            if unknown:
                raise RecordError(
                    f"part {number} has the unknown key {min(unknown)!r}; expected 'text', 'image', 'frames', 'video' or "
                    "'learn'"
                )
            if len(kinds) != 1 or ("learn" in part and kinds != ["text"]):
                raise RecordError(
                    f"part {number} is {as_json(part)}; expected 'text' (and 'learn'), or 'image', 'frames' or 'video'"
                )
            if "text" in part:
                text = Text(_take(part, "text", str))
                turns.append(Turn("text", (text,), learn=_take(part, "learn", bool, True)))
                continue
            if "video" in part:
                turns.append(Turn("text", (self._next_medium(self._sampled(part["video"])),)))
                continue
            frames = [part["image"]] if "image" in part else _take(part, "frames", list)
            if not frames:
                raise RecordError(f"part {number}: 'frames' is empty")
            turns.append(Turn("text", (self._next_medium(frames),)))
        return turns
