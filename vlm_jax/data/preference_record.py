"""Records of preference data -> two ordinary records, the chosen and the rejected one; `jsonl.py` describes the forms."""

from __future__ import annotations

import base64
import copy
import json
from typing import Any

from vlm_jax.errors import RecordError, abbreviated
from vlm_jax.processing.conversation import Conversation

SIDES = ("chosen", "rejected")
OUTPUTS = ("output_1", "output_2")
PROMPTS = ("question", "prompt")
BESIDE = ("image_path",)  # of RLHF-V: where the picture, which is under "image", came from

Sides = tuple[dict[str, Any], dict[str, Any]]


def sides_of(record: dict[str, Any]) -> Sides | None:
    """The chosen and the rejected side, each a record with "conversations" or "messages"; None: it is no preference record.

    Raises:
      RecordError: one side, the prompt, or which side is preferred is missing.
    """
    packed = record.get("text")
    if isinstance(packed, str) and "content" not in record and "conversations" not in record and "messages" not in record:
        record = {key: value for key, value in record.items() if key != "text"} | _unpacked(packed)
    record = {key: value for key, value in record.items() if not (key in BESIDE and "image" in record)}
    if any(key in record for key in OUTPUTS):
        return _of_outputs(record)
    if not any(key in record for key in SIDES):
        return None
    missing = [key for key in SIDES if key not in record]
    if missing:
        raise RecordError(f"has no {missing[0]!r}; expected 'chosen' and 'rejected'")
    prompts = [record[key] for key in PROMPTS if record.get(key) is not None]
    rest = {key: value for key, value in record.items() if key not in (*SIDES, *PROMPTS)}
    if len(prompts) > 1:
        raise RecordError("has 'question' and 'prompt'; expected one of them")
    if isinstance(record["chosen"], list):
        return _of_messages(record, prompts[0] if prompts else [], rest)
    if not prompts:
        raise RecordError("has texts under 'chosen' and 'rejected', and no 'question' or 'prompt'")
    of = lambda answer: [{"from": "human", "value": prompts[0]}, {"from": "gpt", "value": answer}]
    return _both(rest, "conversations", *(of(record[side]) for side in SIDES))


def answer_alone(conversation: Conversation) -> Conversation:
    """With nothing learned but its last turn: the assistant's turns before it are part of the prompt."""
    last = len(conversation) - 1
    return tuple(
        turn if number == last else type(turn)(turn.role, turn.content, learn=False) for number, turn in enumerate(conversation)
    )


def picture_bytes(picture: Any) -> Any:
    """A picture as Hugging Face writes it, {"bytes": base64, "path": ...}: its bytes, or its path; others stay as they are.

    Raises:
      RecordError: bytes that are not in base64.
    """
    if not isinstance(picture, dict) or not picture.keys() <= {"bytes", "path"}:
        return picture
    held = picture.get("bytes")
    if held is None or isinstance(held, bytes):
        return picture.get("path") if held is None else held
    try:
        return base64.b64decode(held, validate=True)
    except (TypeError, ValueError):
        raise RecordError(f"a picture's 'bytes' are {abbreviated(repr(held))}; expected base64") from None


def _unpacked(text: str) -> dict[str, Any]:
    """RLHF-V's field `text`: a JSON object with question, chosen and rejected."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict) or not set(SIDES) <= found.keys():
        raise RecordError(f"'text' is {abbreviated(text)!r}; expected a JSON object with 'question', 'chosen' and 'rejected'")
    return found


def _of_outputs(record: dict[str, Any]) -> Sides:
    """LLaVA-RLHF: two outputs for the last turn of a conversation, which may hold another answer in its place."""
    preferred, turns = record.get("preference"), record.get("conversations")
    if preferred not in (1, 2) or isinstance(preferred, bool):
        raise RecordError(f"'preference' is {abbreviated(repr(preferred))}; expected 1 or 2, the preferred output")
    if isinstance(turns, list) and len(turns) == 1 and isinstance(turns[0], list):
        turns = turns[0]
    if not isinstance(turns, list) or not turns:
        raise RecordError("has outputs and no 'conversations'")
    if isinstance(turns[-1], dict) and turns[-1].get("from") in ("gpt", "assistant"):
        turns = turns[:-1]
    said = []
    for key in OUTPUTS:
        output = record.get(key)
        value = output.get("value") if isinstance(output, dict) else output
        if not isinstance(value, str):
            raise RecordError(f"{key!r} is {abbreviated(repr(output))}; expected an object with 'from' and 'value'")
        said.append([*turns, {"from": "gpt", "value": value}])
    rest = {key: value for key, value in record.items() if key not in (*OUTPUTS, "preference", "conversations")}
    return _both(rest, "conversations", *(said if preferred == 1 else said[::-1]))


def _of_messages(record: dict[str, Any], prompt: Any, rest: dict[str, Any]) -> Sides:
    """TRL: messages of a prompt and of both sides, or both sides with the prompt in front of each."""
    if not all(isinstance(record[side], list) and record[side] for side in SIDES) or not isinstance(prompt, list):
        raise RecordError("'chosen' is a list of messages; expected lists of messages under 'rejected' and 'prompt' too")
    chosen, rejected = ([*prompt, *record[side]] for side in SIDES)
    if chosen[:-1] != rejected[:-1]:
        raise RecordError("'chosen' and 'rejected' differ before their last message; expected the same prompt")
    for side, messages in zip(SIDES, (chosen, rejected), strict=True):
        if not isinstance(messages[-1], dict) or messages[-1].get("role") != "assistant":
            raise RecordError(f"the last message of {side!r} is not the assistant's")
    parts = [part for message in chosen if isinstance(message, dict) for part in _parts(message)]
    images = [rest[key] for key in ("image", "images") if rest.get(key) is not None]
    if images and not any(
        part.get("type") == "image" for part in parts
    ):  # TRL puts the pictures in front of the first user's turn
        count = len(images[0]) if isinstance(images[0], list) else 1
        for messages in (chosen, rejected):
            place = next((n for n, message in enumerate(messages) if message.get("role") == "user"), 0)
            messages[place] = messages[place] | {"content": [*[{"type": "image"}] * count, *_parts(messages[place])]}
    return _both(rest, "messages", chosen, rejected)


def _parts(message: dict[str, Any]) -> list[dict[str, Any]]:
    content = message.get("content")
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    return [part for part in content if isinstance(part, dict)] if isinstance(content, list) else []


def _both(rest: dict[str, Any], key: str, chosen: list[Any], rejected: list[Any]) -> Sides:
    # Copies: what reads the one writes pictures into its parts.
    first, second = (copy.deepcopy(rest | {key: turns}) for turns in (chosen, rejected))
    return first, second
