"""Damages to a published folder, drawn from a seed, and what opening the folder comes to then.

Every value of every JSON file is damaged, and every file as a whole::

    for damage in drawn(folder, seed=3):        # for ever; `settings_damages` has all of them once
        with applied(folder, damage):
            verdict = judged(folder, undamaged)  # of `opened(folder)` before
        good = verdict.kind in ("refused", "same") or verdict.kind == "other" and legitimate(damage)
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import shutil
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vlm_jax.config.register import module_of
from vlm_jax.generation.prompts import _picture_size as picture_size
from vlm_jax.interop.engine import abstract_params, names_known
from vlm_jax.interop.plan import ConversionError, plan
from vlm_jax.interop.published import open_published
from vlm_jax.paths import by_path
from vlm_jax.processing.conversation import from_prompt

VALUES = (0, -1, 10**12, 1e12, 0.5, math.nan, math.inf, None, True, "many", "", [], [0], {}, {"a": 1})
# Values of `VALUES` with which a setting is a good one, and another model: no reader could know better.
OTHERS = {
    "eos_token_id": (0, [0]),
    "vision_feature_layer": (0, -1, [0]),
    "logit_scale_init_value": (0, -1, 0.5),  # what is learned replaces it
    **dict.fromkeys(("factor", "attention_factor", "low_freq_factor", "beta_slow"), (0.5, None)),
    **dict.fromkeys(("short_factor", "long_factor", "image_std", "partial_rotary_factor", "alibi_bias_max"), (0.5,)),
    "image_mean": (0, 0.5),
    "resample": (0,),
    "do_image_splitting": (True,),
    "length_penalty": (0, -1, None),
    "repetition_penalty": (0.5, None),
    # As if it were left out.
    **dict.fromkeys(("rope_parameters", "beta_fast", "sliding_window", "max_new_tokens", "num_beams", "eos_token"), (None,)),
    "do_center_crop": (None,),
}
NOT_SETTINGS = ("tokenizer.json", "vocab.json", ".index.json")  # what stands in them are no settings
REQUEST = "what color is the shape?"


@dataclasses.dataclass(frozen=True)
class Damage:
    """
    Attributes:
      keys: from the top of the file to the value; (): the whole file.
      value: that the setting gets; of a whole file the name of one of `WHOLE`.
    """

    file: str
    keys: tuple[str | int, ...]
    value: Any

    def __str__(self) -> str:
        return f"{self.file}:{'.'.join(map(str, self.keys))}={self.value!r}"


def settings_damages(folder: Path) -> list[Damage]:
    """Every value of every JSON file of settings, with every one of `VALUES` that is another."""
    damages = []
    for path in sorted(folder.rglob("*.json")):
        if not path.name.endswith(NOT_SETTINGS):
            for keys, old in _fields(json.loads(path.read_text())):
                others = [value for value in VALUES if repr(value) != repr(old)]
                damages += [Damage(str(path.relative_to(folder)), keys, value) for value in others]
    return damages


def _fields(value: Any, keys: tuple[str | int, ...] = ()) -> Iterator[tuple[tuple[str | int, ...], Any]]:
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in inner:
        yield (*keys, key), part
        yield from _fields(part, (*keys, key))


def legitimate(damage: Damage) -> bool:
    """Whether the damage makes another model, in its own right."""
    names = [key for key in damage.keys if isinstance(key, str)]
    return bool(names) and any(type(damage.value) is type(good) and damage.value == good for good in OTHERS.get(names[-1], ()))


def _relabelled(dtype: str) -> Callable[[Path], None]:
    """Another type in the header of a safetensors file; sizes stay, so that nothing else is wrong."""

    def damage(path: Path) -> None:
        content = path.read_bytes()
        size = struct.unpack("<Q", content[:8])[0]
        header = json.loads(content[8 : 8 + size])
        for tensor in header.values():
            tensor |= {"dtype": dtype} if "dtype" in tensor else {}
        new = json.dumps(header).encode()
        path.write_bytes(struct.pack("<Q", len(new)) + new + content[8 + size :])

    return damage


def _fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def _folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def _link(path: Path) -> None:
    path.unlink()
    path.symlink_to(path.parent / "nowhere")


# What becomes of a whole file.
WHOLE: dict[str, Callable[[Path], Any]] = {
    "fifo": _fifo,
    "folder": _folder,
    "link": _link,
    "empty": lambda path: path.write_bytes(b""),
    "cut": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "zeros": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "deep": lambda path: path.write_bytes(b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"),
    "deep objects": lambda path: path.write_bytes(b'{"text_config": ' * 20_000 + b"1" + b"}" * 20_000),
    "digits": lambda path: path.write_bytes(b'{"a": ' + b"9" * 5000 + b"}"),
    "surrogate": lambda path: path.write_bytes(b'{"chat_template": "\\ud800", "model_type": "\\udfff"}'),
    "latin-1": lambda path: path.write_bytes(b'{"model_type": "\xe9"}'),
    "list": lambda path: path.write_bytes(b"[1, 2]"),
    "null": lambda path: path.write_bytes(b"null"),
    "I32": _relabelled("I32"),
}


def file_damages(folder: Path) -> list[Damage]:
    """Every file as a whole; what only weights can suffer, for them alone."""
    damages = []
    for path in sorted(folder.rglob("*")):
        if path.suffix in (".json", ".jinja", ".safetensors"):
            own = [kind for kind in WHOLE if kind != "I32" or path.suffix == ".safetensors"]
            damages += [Damage(str(path.relative_to(folder)), (), kind) for kind in own]
    return damages


def drawn(folder: Path, seed: int) -> Iterator[Damage]:
    """Damages to a setting or a file for ever, the same for the same seed."""
    settings, files, rng = settings_damages(folder), file_damages(folder), np.random.default_rng(seed)
    while True:
        some = files if rng.random() < 0.1 else settings
        yield some[rng.integers(len(some))]


@contextlib.contextmanager
def applied(folder: Path, damage: Damage) -> Iterator[None]:
    """The folder is damaged within, and as it was behind."""
    path, kept = folder / damage.file, folder.parent / f"{folder.name}.kept"
    shutil.copyfile(path, kept)
    try:
        if damage.keys:
            settings = json.loads(path.read_text())
            inner = settings
            for key in damage.keys[:-1]:
                inner = inner[key]
            inner[damage.keys[-1]] = damage.value
            path.write_text(json.dumps(settings))
        else:
            WHOLE[damage.value](path)
        yield
    finally:
        if path.is_dir() and not path.is_symlink():
            path.rmdir()
        else:
            path.unlink(missing_ok=True)
        kept.replace(path)


def opened(folder: Path) -> dict[str, Any]:
    """All that an answer depends on but the numbers of the weights, whose names, shapes and types are compared with the model.

    Raises:
      ValueError: of this library, with the cause; anything else is an error of ours.
    """
    checkpoint = open_published(folder, pickles=True)
    processor, config = checkpoint.processor, checkpoint.config
    source = checkpoint.open_source()
    table = max(checkpoint.tables, key=lambda table: names_known(table, source))
    shapes = {path: tuple(leaf.shape) for path, leaf in by_path(abstract_params(module_of(config)(config))).items()}
    plan(table, source, shapes)
    found = {"config": config, "exported": dict(checkpoint.exported_settings)}
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (20, 30, 3), dtype=np.uint8))
    if not processor.answers:
        found["pixels"] = processor.pixels([image]).tobytes()
        return found | ({"tokens": processor.tokens(["a cat", "a dog"]).tolist()} if processor.has_text else {})
    found |= {"settings": processor.defaults, "ends": processor.ends}
    conversation, media = from_prompt(REQUEST, [image] if config.has_vision else [])
    layout = processor.lay_out(conversation, [(20, 30)] * len(media), open=True)
    layout = dataclasses.replace(layout, tokens=np.where(layout.visual != 0, 0, layout.tokens))  # those are not read
    found["layout"] = [getattr(layout, field.name).tolist() for field in dataclasses.fields(layout)]
    found["text"] = processor.tokenizer.decode(list(range(3, 40)))
    if media:
        tiles = processor.media.pixels(media[0])
        picture_size(config, [tile.shape[:2] for tile in tiles])
        found["pixels"] = [(tile.shape, tile.tobytes()) for tile in tiles]
    return found


@dataclasses.dataclass(frozen=True)
class Verdict:
    """
    Attributes:
      kind: "refused" in a clear line, the "same" answers, "other" ones, or an error that is "raw".
      detail: the message, or what is different.
    """

    kind: str
    detail: str = ""


def judged(folder: Path, undamaged: dict[str, Any]) -> Verdict:
    """What becomes of a damaged folder.

    Args:
      undamaged: what `opened` gave before.
    """
    try:
        found = opened(folder)
    except ValueError as error:
        clear = type(error).__module__.startswith("vlm_jax.") or type(error.__cause__).__module__.startswith("vlm_jax.")
        line = "\n" not in str(error) or isinstance(error, ConversionError)
        return Verdict("refused" if clear and line else "raw", f"{type(error).__name__}: {error}")
    except Exception as error:
        return Verdict("raw", repr(error))
    different = [name for name in undamaged if found.get(name) != undamaged[name]]
    return Verdict("other", ", ".join(different)) if different else Verdict("same")
