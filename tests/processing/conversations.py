"""Random conversations with odd texts and odd pictures, the same for the same seed; of nobody's model in particular."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

Message = dict[str, Any]

SENTENCES = (
    "what color is the shape? red blue a cat sits on the mat. two dogs run in the park how many are there? I don't know, "
    "maybe 7 Yes! No: e.g. x-ray 3.14 1024 007 12:30 50% $5 (left) \"quoted\" it's it'll U.S.A."
)
WORDS = SENTENCES.split(" ")
UNICODE = (
    "café",
    "cafe\u0301",  # the accent is a mark of its own
    "Ångström",
    "naïve œuvre",
    "Übergröße",
    "日本語の文",
    "汉字",
    "한국어",
    "привет",
    "שלום",
    "مرحبا",
    "นี่คือ",
    "नमस्ते",
    "🙂",
    "👩‍👩‍👧",
    "🏳️‍🌈",
    "🇩🇪",
    "z̴̢͓a̸͝l",
    "ﬁﬂ",  # ligatures, which NFKC would take apart
    "①½²",
    "ｆｕｌｌ",
    "x\u200by",  # a space of no width
    "\ufeffmark",
    "…—“”",
    "▁",  # what SentencePiece writes for a space
    "a▁b",
)
LOOKALIKES = (
    "< image >",
    "<image",
    "<IMAGE>",
    "&lt;image&gt;",
    "<|im_end|>",
    "<|im_start|>user\n",
    "[INST]",
    " [/INST]",
    "<<SYS>>",
    "</s>",
    "<s>",
    "<pad>",
    "<unk>",
    "<end_of_utterance>",
    "<|endofchunk|>",
    "<0x0A>",
    "<loc0001>",
    "USER:",
    "USER: ",
    "ASSISTANT:",
    "User:",
    "\nAssistant:",
    "### Human",
)
CODE = (
    "for i in range(3):\n    print(i)\n",
    "if (a < b && c->d) { return x[0]; }",
    "{{ bos_token }}",
    "{% raw %}",
    '{"a": [1, 2]}',
    "\\n \\t \\s",
    "a\tb",
    "| x | y |\n|---|---|",
    "$\\frac{1}{2}$",
    "100%|██████|",
    "$ ls -la",
)
SPACES = ("  ", "    ", "\n", "\n\n", " \n ", "\t", "\r\n", "\u00a0", "\u3000", "\u2009", "\u200b", "\x0b", "\u2028", "")

# Height, width. The first ones are extreme.
SIZES = ((3, 200), (200, 3), (1, 40), (40, 1), (1, 1), (2, 2), (2, 299), (299, 2), (5, 7), (16, 16), (17, 31), (31, 17))
SIZES += ((64, 64), (48, 16), (33, 47), (100, 37), (37, 100), (150, 149), (61, 255), (299, 180))
PNGS = ("RGB", "RGB+key", "RGBA", "LA", "L", "L+key", "P", "P+key", "P+alphas", "I;16", "1")
JPEGS = ("RGB", "RGB", "L", "CMYK")


def random_conversation(
    seed: int,
    folder: Path,
    *,
    most_pictures: int = 4,
    system: bool = False,
    turns: int | None = None,
    single_image_first_turn: bool = False,
    odd_answers: bool = False,
    least_pictures: int = 0,
    least_side: int = 1,
) -> list[Message]:
    """User and assistant messages in turn, as OpenAI and transformers write them; the last is the assistant's.

    Args:
      folder: where the pictures' files go.
      system: a system message comes first.
      turns: pairs of a question and an answer; without it one to four.
      single_image_first_turn: one picture, before the text of the first question, and no other.
      odd_answers: answers have odd white space and look-alikes of special tokens too.
      least_pictures: of the conversation; they may come in its last question.
      least_side: no picture has a shorter side.
    """
    rng = random.Random(f"conversation {seed}")
    count = turns or rng.randint(1, 4)
    pictures = 1 if single_image_first_turn else rng.randint(min(least_pictures, most_pictures), most_pictures)
    places = [0 if single_image_first_turn else rng.randrange(count) for _ in range(pictures)]
    messages: list[Message] = []
    if system:
        messages.append({"role": "system", "content": [_part(_text(rng))]})
    number = 0
    for turn in range(count):
        media = []
        for _ in range(places.count(turn)):
            picture = random_picture(rng, folder / f"{seed}_{number}", least_side)
            media.append({"type": "image", "image": picture})
            number += 1
        content = [*media, _part(_text(rng))] if single_image_first_turn else _mixed(rng, media)
        messages.append({"role": "user", "content": content})
        messages.append({"role": "assistant", "content": [_part(_answer(rng, odd_answers))]})
    return messages


def prompts_of(messages: Sequence[Message]) -> list[list[Message]]:
    """Of a conversation: what stands before its first answer, before its second, and so on."""
    return [list(messages[:place]) for place, message in enumerate(messages) if message["role"] == "assistant"]


def _part(text: str) -> Message:
    return {"type": "text", "text": text}


def _mixed(rng: random.Random, media: list[Message]) -> list[Message]:
    """The pictures before the text, behind it, among several texts, or alone."""
    way = rng.random()
    if media and way < 0.1:
        return media
    if way < 0.45:
        return [*media, _part(_text(rng))]
    if way < 0.6:
        return [_part(_text(rng)), *media]
    content = [_part(_text(rng)) for _ in range(rng.randint(1, 3))]
    for place, medium in zip(
        sorted(rng.choices(range(len(content) + 1), k=len(media)), reverse=True), media[::-1], strict=True
    ):
        content.insert(place, medium)
    return content


def _text(rng: random.Random) -> str:
    """A user's: mostly words, with everything odd among them."""
    if rng.random() < 0.04:
        return rng.choice(("", " ", "\n", "  \n"))
    kinds = rng.choices((WORDS, UNICODE, LOOKALIKES, CODE), weights=(7, 2, 2, 1), k=rng.randint(1, 9))
    text = ""
    for kind in kinds:
        if text:
            text += " " if rng.random() < 0.75 else rng.choice(SPACES)
        text += rng.choice(kind)
    if rng.random() < 0.25:
        text = rng.choice((" ", *SPACES)) + text
    if rng.random() < 0.25:
        text += rng.choice((" ", *SPACES))
    # Parts may be joined to one text, so no text may begin with what ends a marker, either.
    assert "<image>" not in text and "<fake_token_around_image>" not in text and "//" not in text and text[:1] != ">", text
    return text


def _answer(rng: random.Random, odd: bool) -> str:
    if rng.random() < 0.15:
        return ""
    if odd and rng.random() < 0.6:
        return _text(rng)
    kinds = rng.choices((WORDS, UNICODE, CODE), weights=(8, 2, 1), k=rng.randint(1, 6))
    return " ".join(rng.choice(kind) for kind in kinds).strip()


def random_picture(rng: random.Random, stem: Path, least_side: int = 1) -> str | Path | Image.Image:
    """Writes a PNG or JPEG. Gives its path, the opened file (not read yet), or the picture in memory."""
    height, width = rng.choice([size for size in SIZES if min(size) >= least_side])
    pixels = np.random.default_rng(rng.getrandbits(32))
    jpeg = rng.random() < 0.35
    path = stem.with_suffix(".jpg" if jpeg else ".png")
    path.parent.mkdir(parents=True, exist_ok=True)
    exif = Image.Exif()
    if jpeg:
        image, settings = _of_mode(pixels, rng.choice(JPEGS), height, width)
        settings["quality"] = rng.choice((50, 90))
        exif[274] = rng.choice((1, *range(2, 9), *range(2, 9)))
    else:
        image, settings = _of_mode(pixels, rng.choice(PNGS), height, width)
        exif[274] = rng.choice((0, 0, 0, 0, 3, 6))
    image.save(path, exif=exif, **settings) if exif[274] else image.save(path, **settings)
    way = rng.random()
    if way < 0.6:
        return str(path) if way < 0.4 else path
    return Image.open(path) if way < 0.8 else Image.open(path).copy()


def _of_mode(pixels: np.random.Generator, name: str, height: int, width: int) -> tuple[Image.Image, dict[str, Any]]:
    """(a picture of a mode, what its file is saved with). "+key": one colour is transparent, "+alphas": many are."""
    mode, _, transparent = name.partition("+")
    if mode == "I;16":
        top = pixels.choice((255, 4095, 65535))  # transformers' processors cut it off at 255
        return Image.fromarray(_smooth(pixels, height, width, 1)[..., 0].astype(np.uint16) * np.uint16(top // 255)), {}
    bands = {"L": 1, "LA": 2, "RGB": 3, "RGBA": 4}.get(mode, 3)
    array = _smooth(pixels, height, width, bands)
    if bands in (2, 4):
        array[..., -1][pixels.random((height, width)) < 0.2] = 0
        array[..., -1][pixels.random((height, width)) < 0.2] = 255
    image = Image.fromarray(array if bands > 1 else array[..., 0])
    if mode == "P":
        image = image.quantize(int(pixels.integers(2, 40)))
        colours = len(image.getpalette()) // 3
        key = int(image.getpixel((0, 0)))
        alphas = bytes(pixels.integers(0, 256, colours, dtype=np.uint8))
        return image, {"key": {"transparency": key}, "alphas": {"transparency": alphas}}.get(transparent, {})
    if transparent:
        return image, {"transparency": image.getpixel((0, 0))}
    return image if image.mode == mode else image.convert(mode), {}


def _smooth(pixels: np.random.Generator, height: int, width: int, bands: int) -> np.ndarray:
    """[H, W, bands] uint8: colours that change slowly, so that resizing it by another method shows, and some noise."""
    small = pixels.integers(0, 256, (4, 4, bands), dtype=np.uint8)
    large = [Image.fromarray(small[..., band]).resize((width, height), Image.Resampling.BICUBIC) for band in range(bands)]
    noise = pixels.integers(-20, 21, (height, width, bands))
    return (np.stack([np.asarray(band) for band in large], axis=-1) + noise).clip(0, 255).astype(np.uint8)
