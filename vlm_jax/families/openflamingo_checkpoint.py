"""An OpenFlamingo checkpoint: the authors' file, and the two published models that were frozen in it.

A folder for `load` has the file, and a `config.json` that names the other two::

    {
      "model_type": "open_flamingo",
      "checkpoint": "checkpoint.pt",
      "vision": "openai/clip-vit-large-patch14",
      "language": "togethercomputer/RedPajama-INCITE-Base-3B-v1",
      "cross_attn_every_n_layers": 2
    }

Its language models are MPT-1B (3B; `"anas-awadalla/mpt-1b-redpajama-200b"`, every layer), RedPajama-3B (4B, every second) and
MPT-7B (9B, every fourth). Pictures are prepared as open_clip does, which the authors use.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vlm_jax.config.consistency import check_consistent
from vlm_jax.config.generation import Settings
from vlm_jax.families import clip
from vlm_jax.families.open_clip import OpenClipTransform
from vlm_jax.families.openflamingo import (
    LANGUAGE_PART,
    SAVED,
    VISION_PART,
    config_from_parts,
    embedding_name,
    gated_name,
    language_layers,
    layer_name,
    table,
    tied_names,
    vocabulary_names,
)
from vlm_jax.interop.checkpoint import Checkpoint
from vlm_jax.interop.files import bounds, safetensors_files
from vlm_jax.interop.files.folder import (
    check_processing,
    check_tokenizer,
    copy_settings,
    find,
    open_weights,
    read_config,
    refused,
)
from vlm_jax.interop.files.safetensors_files import SafetensorsFiles
from vlm_jax.interop.files.settings import check_settings, read_settings
from vlm_jax.interop.files.source import FirstRows, Joined, PublishedError, Renamed, Source
from vlm_jax.interop.files.torch_pickle import TorchPickles
from vlm_jax.interop.register import FAMILIES, LANGUAGE
from vlm_jax.processing.media import PublishedMedia
from vlm_jax.processing.published import PublishedProcessor

MODEL_TYPE = "open_flamingo"
PROCESSING = "processing"  # where a run keeps the tokenizer, and the sizes of pictures
SETTINGS = ("checkpoint", "vision", "language", "cross_attn_every_n_layers")
IMAGE, END_OF_CHUNK, PAD = "<image>", "<|endofchunk|>", "<PAD>"


@dataclasses.dataclass(frozen=True)
class Wrapped:
    """The two halves of a transformers processor; a chat template of the language model is none of OpenFlamingo's."""

    tokenizer: Any
    image_processor: OpenClipTransform


class OpenFlamingoProcessor(PublishedProcessor):
    """Text as it is, a token for each picture; an answer ends with `<|endofchunk|>`."""

    after_answer = after_text = END_OF_CHUNK

    def __init__(self, tokenizer: Any, side: int) -> None:
        """
        Args:
          tokenizer: transformers'; the added tokens become part of it.
          side: of the vision encoder's pictures in pixels.
        """
        tokenizer.add_special_tokens({"additional_special_tokens": [END_OF_CHUNK, IMAGE]})
        if tokenizer.pad_token is None:
            tokenizer.add_special_tokens({"pad_token": PAD})
        end = tokenizer.convert_tokens_to_ids(END_OF_CHUNK)
        pictures = OpenClipTransform(side)
        media = PublishedMedia(pictures, side, tile_tokens=0)
        super().__init__(Wrapped(tokenizer, pictures), {end}, Settings(), media=media, image_token=IMAGE)


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
        vision, language = _vision_config(parts), _language_config(parts)
        file = folder / settings["checkpoint"]
        trained = _trained(file, language, every, pickles=pickles)
        tensors = trained.tensors
        depth = len({name.split(".")[2] for name in tensors if name.startswith("perceiver.layers.")})
        latents = tensors["perceiver.latents"].shape[0]
        vocabulary = tensors[embedding_name(language)].shape[0]
        config = config_from_parts(vision, language, every=every, vocabulary=vocabulary, latents=latents, depth=depth)
        try:
            check_consistent(config)
        except ValueError as error:
            raise PublishedError(f"{folder / 'config.json'}: {error}") from error
        processor = OpenFlamingoProcessor(_tokenizer(parts["language"], language), config.vision.image_size)
        if processor.tokenizer.vocab_size > vocabulary:
            raise PublishedError(
                f"{file}: its vocabulary has {vocabulary} tokens, and the tokenizer of {parts['language']} has "
                f"{processor.tokenizer.vocab_size} with OpenFlamingo's: is it the file for this language model?"
            )
        layers = language_layers(language)
        processor.limit_to(vocabulary)

        def source() -> Joined:
            frozen = {name: open_weights(part, pickles) for name, part in parts.items()}
            names = [name for name in vocabulary_names(language, tensors) if name in frozen["language"].tensors]
            decoder = _resized(frozen["language"], names, vocabulary, file=file, part=parts["language"])
            return Joined({VISION_PART: _tower(frozen["vision"]), LANGUAGE_PART: decoder, "": trained})

        def exported_name(name: str) -> str | None:
            # What the authors' file holds, for `load_state_dict(..., strict=False)`.
            return None if name.startswith((VISION_PART, LANGUAGE_PART)) else layer_name(name, layers, every)

        return Checkpoint(
            path=folder,
            config=config,
            processor=processor,
            tables=(table(config, language, tensors),),
            open_source=source,
            keep_files=lambda target: _keep_files(folder, parts, target),
            exported_name=exported_name,
            exported_settings={"checkpoint": safetensors_files.NAME},
        )

    def open_processor(self, folder: Path) -> OpenFlamingoProcessor:
        """The processor of a folder as above, whose checkpoint may be missing.

        Raises:
          PublishedError: the tokenizer or the configuration of a part it names cannot be read.
        """
        kept = {name: folder / PROCESSING / name for name in ("vision", "language")}
        parts = kept if kept["language"].is_dir() else _parts(folder, _settings(folder), pickles=True)
        tokenizer = _tokenizer(parts["language"], _language_config(parts))
        return OpenFlamingoProcessor(tokenizer, _vision_config(parts).image_size)


FAMILIES.add(MODEL_TYPE)(OpenFlamingoFamily())


def _keep_files(folder: Path, parts: dict[str, Path], target: Path) -> None:
    """Writes the settings, with the parts where they are now, and the processing of the two beside them."""
    target.mkdir(parents=True, exist_ok=True)
    for name, part in parts.items():
        copy_settings(part, target / PROCESSING / name)
    settings = read_settings(folder / "config.json")
    settings |= {name: str(part.resolve()) for name, part in parts.items()}
    settings["checkpoint"] = str((folder / settings["checkpoint"]).resolve())
    (target / "config.json").write_text(json.dumps(settings, indent=2) + "\n")


def _vision_config(parts: dict[str, Path]) -> Any:
    config = read_config(parts["vision"], ("clip", "clip_vision_model"))
    return _usable(parts["vision"], getattr(config, "vision_config", config), clip.vision_from_hf)


def _language_config(parts: dict[str, Path]) -> Any:
    config = read_config(parts["language"], LANGUAGE)
    return _usable(parts["language"], config, LANGUAGE[config.model_type].config_from_hf)


def _usable(folder: Path, config: Any, config_from_hf: Callable[[Any], Any]) -> Any:
    """A part's configuration, which can be made into ours."""
    try:
        config_from_hf(config)
    except ValueError as error:
        raise PublishedError(f"{folder / 'config.json'}: {error}") from error
    return config


def _settings(folder: Path) -> dict[str, Any]:
    settings = read_settings(folder / "config.json")
    check_settings(folder / "config.json", settings, bounds.OPEN_FLAMINGO)
    missing = [name for name in SETTINGS if name not in settings]
    if missing:
        raise PublishedError(f"{folder / 'config.json'}: {missing[0]!r} is missing; expected {', '.join(SETTINGS)}")
    return settings


def _parts(folder: Path, settings: dict[str, Any], *, pickles: bool) -> dict[str, Path]:
    # A folder beside this one, any folder, or a hub name.
    beside = {name: folder / settings[name] for name in ("vision", "language")}
    return {name: find(p if p.is_dir() else settings[name], pickles=pickles) for name, p in beside.items()}


def _trained(file: Path, language: Any, every: int, *, pickles: bool) -> Source:
    """What the authors' file holds, by the names of the table.

    Args:
      language: transformers' configuration of the language model.
    """
    saved = Renamed(_saved(file, pickles=pickles), lambda name: gated_name(name, every))
    embedding = embedding_name(language)
    if embedding not in saved.tensors:
        # An embedding that was frozen is saved by the name of the head that it is tied to.
        tied = tied_names(language)
        saved = Renamed(saved, lambda name: tied.get(name, name))
    for name in (embedding, "perceiver.latents"):
        if name not in saved.tensors:
            raise PublishedError(f"{file} holds no {name}: is it the file for this language model?")
    return saved


def _saved(file: Path, *, pickles: bool) -> Source:
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


def _tower(clip: Source) -> Source:
    """The vision tower of a whole CLIP; a tower alone may have its prefix, or none, as transformers 5 saves it."""
    prefix = "vision_model."
    if not any(name.startswith(prefix) for name in clip.tensors):
        return clip
    return Renamed(clip, lambda name: name if name.startswith(prefix) else None)


def _resized(source: Source, names: list[str], vocabulary: int, *, file: Path, part: Path) -> Source:
    """The language model with as many tokens as the checkpoint, which the authors' code resizes to the tokenizer's.

    Args:
      names: of the tensors with a row for each token that are not in the checkpoint.
      file, part: the checkpoint, and the language model's folder, for the message.

    Raises:
      PublishedError: rows were added, which only the checkpoint could hold.
    """
    for name in names:
        if (rows := source.tensors[name].shape[0]) < vocabulary:
            raise PublishedError(
                f"{file}: its vocabulary has {vocabulary} tokens, and {name} of {part} has rows for {rows}: those that were "
                f"added are in neither. Save the checkpoint with {SAVED}{name}"
            )
    return FirstRows(source, dict.fromkeys(names, vocabulary))


def _tokenizer(folder: Path, language: Any) -> Any:
    """
    Args:
      language: transformers' configuration in the folder.
    """
    check_processing(folder)
    from transformers import AutoTokenizer

    with refused(f"{folder}: AutoTokenizer cannot read it"):
        found = AutoTokenizer.from_pretrained(folder, config=language, trust_remote_code=False)
    check_tokenizer(folder, found)
    return found
