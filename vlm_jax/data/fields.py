"""A record of a table -> Example, by the names of its fields (`FieldsConfig`)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vlm_jax.config.sources import FieldsConfig
from vlm_jax.data.example import Example
from vlm_jax.data.jsonl_record import Record
from vlm_jax.errors import RecordError, as_json
from vlm_jax.processing.conversation import Medium, Text, assistant, user
from vlm_jax.processing.pictures import Picture


def check_fields(where: str, fields: FieldsConfig) -> None:
    """
    Raises:
      ValueError: neither answers nor a conversation are named, or both.
    """
    if bool(fields.answer) == bool(fields.conversation):
        raise ValueError(
            f"{where}.fields: name the field of the answers ({where}.fields.answer, and question if there is one), or that of "
            f"the turns ({where}.fields.conversation)"
        )


def example_of(where: str, record: dict[str, Any], fields: FieldsConfig) -> Example:
    """
    Args:
      where: the example's name.

    Raises:
      RecordError, RequestError: a field that is missing or of another kind.
    """
    pictures = [_picture(value) for value in _as_list(_field(record, fields.image))] if fields.image else []
    if fields.conversation:
        return _conversation(where, _field(record, fields.conversation), pictures)
    answers = _texts(record, fields.answer)
    questions = _texts(record, fields.question) if fields.question else [""] * len(answers)
    if len(questions) == 1 and len(answers) > 1:
        questions *= len(answers)
    if len(questions) != len(answers) or not answers:
        raise RecordError(f"{len(questions)} of {fields.question!r} and {len(answers)} of {fields.answer!r}; expected pairs")
    media = [Medium(number) for number in range(len(pictures))]
    ask = lambda question: user(*media, *([Text(question)] if question else []))
    conversations = tuple((ask(question), assistant(answer)) for question, answer in zip(questions, answers, strict=True))
    return Example(where, tuple((picture,) for picture in pictures), conversations)


def _conversation(where: str, turns: Any, pictures: list[Picture]) -> Example:
    turns = _present(turns)
    if not isinstance(turns, list) or not turns or not all(isinstance(turn, dict) for turn in turns):
        raise RecordError(f"its turns are {as_json(turns)}; expected a list of objects")
    kind = "messages" if "role" in turns[0] else "conversations"
    # Pictures are bytes or files already: a name within the turns would be of nothing that is here.
    return Record(where, {kind: turns, "images": pictures}, _picture).example()


def _present(value: Any) -> Any:
    """Without the keys that a table fills up with None."""
    if isinstance(value, dict):
        return {key: _present(item) for key, item in value.items() if item is not None}
    return [_present(item) for item in value] if isinstance(value, list) else value


def _field(record: Any, name: str) -> Any:
    value = record
    for part in name.split("/"):
        value = [_key(item, part, name) for item in value] if isinstance(value, list) else _key(value, part, name)
    return value


def _key(value: Any, part: str, name: str) -> Any:
    if not isinstance(value, dict) or part not in value:
        known = ", ".join(map(str, value)) if isinstance(value, dict) else as_json(value)
        raise RecordError(f"has no field {name!r}; there is {known}")
    return value[part]


def _as_list(value: Any) -> list[Any]:
    if value is None:
        return []
    return value if isinstance(value, list) else [value]


def _texts(record: dict[str, Any], name: str) -> list[str]:
    value = _field(record, name)
    values = [value] if isinstance(value, str | bytes) else list(value)
    texts = [item.decode() if isinstance(item, bytes) else item for item in values]
    wrong = next((text for text in texts if not isinstance(text, str)), None)
    if wrong is not None:
        raise RecordError(f"its {name!r} is {as_json(wrong)}; expected a text")
    return texts


def _picture(value: Any) -> Picture:
    """Bytes, a file, pixels, or the struct of `datasets` {"bytes": ..., "path": ...}."""
    found = (value.get("bytes") or value.get("path")) if isinstance(value, dict) else value
    if not isinstance(found, Picture) or isinstance(found, Path):
        raise RecordError(f"a picture is {as_json(found)}; expected its bytes, its file's path or pixels")
    return found
