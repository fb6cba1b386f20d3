"""An OpenFlamingo checkpoint: the authors' file, and the two published models that were frozen in it.

A folder for `load` has the file, and a `config.json` that names the other two::

    {
      "model_type": "open_flamingo",
      "checkpoint": "checkpoint.pt",
      "vision": "openai/clip-vit-large-patch14",
      "language": "togethercomputer/RedPajama-INCITE-Base-3B-v1",
      "cross_attn_every_n_layers": 2
    }

Language models of transformers' own kinds are read: MPT-7B (of the 9B) and RedPajama-3B (of the 4B), not the MPT-1B of the 3B
models, whose architecture lives in a hub repository's code.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from vlm_jax.config.generation import Settings
from vlm_jax.errors import first_line
from vlm_jax.families.openflamingo import (
    LANGUAGE_PART,
    VISION_PART,
    config_from_parts,
    embedding_name,
    gated_name,
    language_layers,
    layer_name,
    table,
)
from vlm_jax.interop.checkpoint import Checkpoint
from vlm_jax.interop.files import safetensors_files
from vlm_jax.interop.files.folder import check_tokenizer, copy_settings, find, open_weights, read_config
from vlm_jax.interop.files.safetensors_files import SafetensorsFiles
from vlm_jax.interop.files.source import Joined, PublishedError, Renamed, Source
from vlm_jax.interop.files.torch_pickle import TorchPickles
from vlm_jax.interop.register import FAMILIES, LANGUAGE
from vlm_jax.processing.media import PublishedMedia
from vlm_jax.processing.published import PublishedProcessor

MODEL_TYPE = "open_flamingo"
PROCESSING = "processing"  # where a run keeps the tokenizer and the picture processor
SETTINGS = ("checkpoint", "vision", "language", "cross_attn_every_n_layers")
IMAGE, END_OF_CHUNK, PAD = "<image>", "<|endofchunk|>", "<PAD>"


@dataclasses.dataclass(frozen=True)
class Wrapped:
    """The two halves of a transformers processor."""

    tokenizer: Any
    image_processor: Any


class OpenFlamingoProcessor(PublishedProcessor):
    """Text as it is, a token for each picture; an answer ends with `<|endofchunk|>`."""

    after_answer = after_text = END_OF_CHUNK

    def __init__(self, hf_processor: Wrapped, side: int) -> None:
        tokenizer = hf_processor.tokenizer
        tokenizer.add_special_tokens({"additional_special_tokens": [END_OF_CHUNK, IMAGE]})
        if tokenizer.pad_token is None:
            tokenizer.add_special_tokens({"pad_token": PAD})
        end = tokenizer.convert_tokens_to_ids(END_OF_CHUNK)
        media = PublishedMedia(hf_processor.image_processor, side, tile_tokens=0)
        super().__init__(hf_processor, {end}, Settings(), media=media, image_token=IMAGE)


class OpenFlamingoFamily:
    """Opens a folder as above."""

    pads_to_square = False

    def open(self, folder: Path, *, pickles: bool, pad_to_square: bool) -> Checkpoint:
        """
        Raises:
          PublishedError: the folder or one of the parts it names is missing, damaged, or of another kind.
        """
        settings = _settings(folder)
        every, parts = settings["cross_attn_every_n_layers"], _parts(folder, settings, pickles=pickles)
        vision, language = _vision_config(parts), read_config(parts["language"], LANGUAGE)
        trained = Renamed(_trained(folder / settings["checkpoint"], pickles=pickles), lambda name: gated_name(name, every))
        tensors, embedding = trained.tensors, embedding_name(language)
        for name in (embedding, "perceiver.latents"):
            if name not in tensors:
                raise PublishedError(
                    f"{folder / settings['checkpoint']} holds no {name}: is it the file for this language model?"
                )
        depth = len({name.split(".")[2] for name in tensors if name.startswith("perceiver.layers.")})
        latents = tensors["perceiver.latents"].shape[0]
        vocabulary = tensors[embedding].shape[0]
        config = config_from_parts(vision, language, every=every, vocabulary=vocabulary, latents=latents, depth=depth)
        layers = language_layers(language)

        def source() -> Joined:
            tower = lambda name: name if name.startswith("vision_model.") else None  # of a whole CLIP
            frozen = {name: open_weights(part, pickles) for name, part in parts.items()}
            return Joined({VISION_PART: Renamed(frozen["vision"], tower), LANGUAGE_PART: frozen["language"], "": trained})

        def exported_name(name: str) -> str | None:
            # What the authors' file holds, for `load_state_dict(..., strict=False)`.
            return None if name.startswith((VISION_PART, LANGUAGE_PART)) else layer_name(name, layers, every)

        return Checkpoint(
            path=folder,
            config=config,
            processor=OpenFlamingoProcessor(_wrapped(parts), config.vision.image_size),
            tables=(table(config, language),),
            open_source=source,
            keep_files=lambda target: _keep_files(folder, parts, target),
            exported_name=exported_name,
            exported_settings={"checkpoint": safetensors_files.NAME},
        )

    def open_processor(self, folder: Path) -> OpenFlamingoProcessor:
        """The processor of a folder as above, whose checkpoint may be missing.

        Raises:
          PublishedError: the tokenizer or the picture processor of a part it names cannot be read.
        """
        kept = {name: folder / PROCESSING / name for name in ("vision", "language")}
        parts = kept if kept["language"].is_dir() else _parts(folder, _settings(folder), pickles=True)
        return OpenFlamingoProcessor(_wrapped(parts), _vision_config(parts).image_size)


FAMILIES.add(MODEL_TYPE)(OpenFlamingoFamily())


def _keep_files(folder: Path, parts: dict[str, Path], target: Path) -> None:
    """Writes the settings, with the parts where they are now, and the processing of the two beside them."""
    target.mkdir(parents=True, exist_ok=True)
    for name, part in parts.items():
        copy_settings(part, target / PROCESSING / name)
    settings = json.loads((folder / "config.json").read_text())
    settings |= {name: str(part.resolve()) for name, part in parts.items()}
    settings["checkpoint"] = str((folder / settings["checkpoint"]).resolve())
    (target / "config.json").write_text(json.dumps(settings, indent=2) + "\n")


def _vision_config(parts: dict[str, Path]) -> Any:
    config = read_config(parts["vision"], ("clip", "clip_vision_model"))
    return getattr(config, "vision_config", config)


def _settings(folder: Path) -> dict[str, Any]:
    settings = json.loads((folder / "config.json").read_text())
    missing = [name for name in SETTINGS if name not in settings]
    if missing:
        raise PublishedError(f"{folder / 'config.json'}: {missing[0]!r} is missing; expected {', '.join(SETTINGS)}")
    return settings


def _parts(folder: Path, settings: dict[str, Any], *, pickles: bool) -> dict[str, Path]:
    # A folder beside this one, any folder, or a hub name.
    beside = {name: folder / settings[name] for name in ("vision", "language")}
    return {name: find(p if p.is_dir() else settings[name], pickles=pickles) for name, p in beside.items()}


def _trained(file: Path, *, pickles: bool) -> Source:
    if file.suffix == ".safetensors":
        return SafetensorsFiles([file])
    if not pickles:
        raise PublishedError(f"{file} is a pickle. Allow it with pickles=True (--pickles); nothing in it is executed")
    saved = TorchPickles([file])
    # The authors' training saves the optimizer and the schedule too, and what it ran in puts its own name in front.
    inside = "model_state_dict."
    whole = not any(name.startswith(inside) for name in saved.tensors)
    plain = lambda name: name.removeprefix(inside).removeprefix("module.")
    return Renamed(saved, lambda name: plain(name) if whole or name.startswith(inside) else None)


def _wrapped(parts: dict[str, Path]) -> Wrapped:
    from transformers import AutoImageProcessor, AutoTokenizer

    readers = {"language": AutoTokenizer, "vision": AutoImageProcessor}
    read = {}
    for name, reader in readers.items():
        try:
            more = {"backend": "pil"} if name == "vision" else {}
            read[name] = reader.from_pretrained(parts[name], trust_remote_code=False, **more)
        except Exception as error:  # whatever a missing or wrong file makes transformers raise
            cause = first_line(error)
            raise PublishedError(f"{parts[name]}: {reader.__name__} cannot read it ({cause})") from error
    check_tokenizer(parts["language"], read["language"])
    return Wrapped(read["language"], read["vision"])
