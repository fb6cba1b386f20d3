"""Interleaved documents as published -> the interleaved record of `jsonl.py`: a list of texts and pictures.

OBELICS (Laurençon et al. 2023): two lists of equal length, a text or a picture at each place::

    {"texts": ["My dog.", null, "He sleeps."], "images": [null, "dog.jpg", null]}

MMC4 (Zhu et al. 2023): sentences, pictures, and how like each picture is to each sentence::

    {"text_list": ["My dog.", "He sleeps."], "image_info": [{"image_name": "dog.jpg"}], "similarity_matrix": [[0.31, 0.2]]}

Each of MMC4's pictures stands before the sentence it is assigned to, one a sentence, those below `SIMILARITY` left out
(OpenFlamingo's `preprocess_interleaved`). The picture of OpenFlamingo's own shards is `image_base64` in place of a name.
"""

from __future__ import annotations

import base64
import binascii
from typing import Any

import numpy as np

from vlm_jax.errors import RecordError, as_json

SIMILARITY = 0.24  # OpenFlamingo's mmc4_textsim_threshold


def as_content(record: dict[str, Any]) -> dict[str, Any]:
    """The record with its document under "content"; another one as it is.

    Raises:
      RecordError: lists of another kind or length, or no picture that is like enough to a sentence.
    """
    if "text_list" in record and "image_info" in record:
        return {"content": _mmc4(record)}
    if "texts" in record and "images" in record:
        return {"content": _obelics(record)}
    return record


def _obelics(record: dict[str, Any]) -> list[dict[str, Any]]:
    texts, images = (_list(record, key) for key in ("texts", "images"))
    if len(texts) != len(images):
        raise RecordError(f"{len(texts)} 'texts' and {len(images)} 'images'; expected lists of equal length")
    content = []
    for number, (text, image) in enumerate(zip(texts, images, strict=True), 1):
        if (text is None) == (image is None):
            raise RecordError(f"place {number} of 'texts' and 'images' is {as_json([text, image])}; expected one of them")
        content.append({"text": text} if image is None else {"image": image})
    return content


def _mmc4(record: dict[str, Any]) -> list[dict[str, Any]]:
    from scipy.optimize import linear_sum_assignment

    texts, infos, matrix = (_list(record, key) for key in ("text_list", "image_info", "similarity_matrix"))
    try:
        similar = np.asarray(matrix, np.float64).reshape(len(infos), len(texts))
    except (ValueError, TypeError):
        raise RecordError(
            f"'similarity_matrix' is {as_json(matrix)}; expected {len(infos)} rows, one a picture, of {len(texts)} numbers"
        ) from None
    before = {
        int(sentence): infos[picture]
        for picture, sentence in zip(*linear_sum_assignment(-similar), strict=True)
        if similar[picture, sentence] >= SIMILARITY
    }
    if not before:
        raise RecordError(f"no picture is as like to a sentence as {SIMILARITY}")
    content: list[dict[str, Any]] = []
    for number, text in enumerate(texts):
        if number in before:
            content.append({"image": _picture(before[number])})
        # Sentences are joined by spaces, and nothing stands between a picture and its sentence.
        space = " " if number and number not in before else ""
        content.append({"text": f"{space}{text}" if isinstance(text, str) else text})
    return content


def _picture(info: Any) -> Any:
    if isinstance(info, dict) and info.get("image_base64"):
        try:
            return base64.b64decode(info["image_base64"], validate=True)
        except (binascii.Error, ValueError, TypeError):
            raise RecordError("'image_base64' is no picture in base64") from None
    return info.get("image_name") if isinstance(info, dict) else info


def _list(record: dict[str, Any], key: str) -> list[Any]:
    value = record.get(key)
    if not isinstance(value, list):
        raise RecordError(f"{key!r} is {as_json(value)}; expected a list")
    return value
