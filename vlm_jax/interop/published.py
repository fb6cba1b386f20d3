"""Published checkpoints in and out: opened by name, and the folders that transformers saves."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vlm_jax.config import DualEncoderConfig, ImageTowerConfig, ModelConfig, TextTowerConfig, VitConfig
from vlm_jax.config.consistency import check_consistent
from vlm_jax.config.generation import Settings
from vlm_jax.interop.checkpoint import Checkpoint, Config
from vlm_jax.interop.files import bounds
from vlm_jax.interop.files.folder import (
    check_folder,
    check_processing,
    check_tokenizer,
    copy_settings,
    find,
    known_type,
    open_weights,
    read_config,
    refused,
)
from vlm_jax.interop.files.settings import check_settings, read_settings
from vlm_jax.interop.files.source import PublishedError
from vlm_jax.interop.register import FAMILIES, FILES, LANGUAGE, LanguageFamily
from vlm_jax.interop.table import Table
from vlm_jax.processing.encoder_processor import EncoderProcessor
from vlm_jax.processing.processor import Processor
from vlm_jax.processing.published import PublishedProcessor

log = logging.getLogger(__name__)

PADDED_TO = 16  # texts whose padding is masked are as long as the longest of them, rounded up to a multiple of this

# Unsupported settings of generation_config.json and their no-op values.
UNSUPPORTED_SETTINGS: dict[str, tuple[Any, ...]] = {
    "no_repeat_ngram_size": (None, 0),
    "encoder_no_repeat_ngram_size": (None, 0),
    "min_new_tokens": (None, 0),
    "min_length": (None, 0),
    "bad_words_ids": (None,),
    "suppress_tokens": (None,),
    "begin_suppress_tokens": (None,),
    "forced_bos_token_id": (None,),
    "forced_eos_token_id": (None,),
    "num_beam_groups": (None, 1),
    "diversity_penalty": (None, 0),
    "typical_p": (None, 1),
    "min_p": (None,),
    "guidance_scale": (None, 1),
}


@dataclasses.dataclass(frozen=True)
class Family:
    """A family whose folders transformers saves and loads.

    Attributes:
      table: from our configuration and transformers'; the names that are written.
      other_tables: of the same tensors under names that are read, not written.
      fit_pictures: our configuration for what transformers' picture processor makes, from ours, theirs and that processor.
      processor: from the same two and transformers' processor; of a model that answers, the rest as `PublishedProcessor`
        takes it.
      pads_to_square: whether it was evaluated with pictures padded to squares, see `PublishedMedia.background`.
    """

    config_from_hf: Callable[[Any], Config]
    table: Callable[[Any, Any], Table]
    processor: Callable[..., PublishedProcessor | EncoderProcessor]
    other_tables: tuple[Callable[[Any], Table], ...] = ()
    fit_pictures: Callable[[Any, Any, Any], Config] = lambda config, hf_config, pictures: config
    pads_to_square: bool = False

    def open(self, folder: Path, *, pickles: bool, pad_to_square: bool) -> Checkpoint:
        """
        Raises:
          PublishedError: the folder is damaged.
        """
        hf_config = read_config(folder, FAMILIES)
        try:
            config = self.config_from_hf(hf_config)
            check_consistent(config)
        except ValueError as error:
            raise PublishedError(f"{folder / 'config.json'}: {error}") from error
        hf_processor = read_processor(folder, vision=config.has_vision, hf_config=hf_config)
        if config.has_vision:
            pictures = getattr(hf_processor, "image_processor", hf_processor)
            config = self.fit_pictures(config.with_pixels(**_pixels(pictures)), hf_config, pictures)
        settings = _generation(folder, hf_config, getattr(hf_processor, "tokenizer", hf_processor)) if config.answers else ()
        processor = self.processor(config, hf_config, hf_processor, *settings)
        if config.answers:
            processor.limit_to(config.language.vocab_size)
        if pad_to_square:
            background = tuple(int(255 * mean) for mean in config.vision.mean)
            media = dataclasses.replace(processor.media, background=background)
            processor.spread = dataclasses.replace(processor.spread, media=media)
        return Checkpoint(
            path=folder,
            config=config,
            processor=processor,
            tables=(self.table(config, hf_config), *(table(config) for table in self.other_tables)),
            open_source=lambda: open_weights(folder, pickles),
            keep_files=lambda target: copy_settings(folder, target),
        )

    def open_processor(self, folder: Path) -> Processor:
        """The processing alone.

        Raises:
          PublishedError: the folder is damaged.
        """
        return self.open(folder, pickles=False, pad_to_square=False).processor


def register_language(*names: str, part: LanguageFamily) -> None:
    """Registers a language model of these `model_type`s as a part of larger models, and by itself.

    A file of the model without its head has names without the prefix, as the hub's OPT-350M.
    """
    headless = {part.prefix: "", part.head: part.head}
    alone = Family(
        config_from_hf=lambda hf: ModelConfig(vision=None, connector=None, fusion=None, language=part.config_from_hf(hf)),
        table=lambda config, hf: part.table(config.language).under(ours="language/"),
        processor=lambda config, hf, *rest: PublishedProcessor(*rest),
        other_tables=(lambda config: part.table(config.language).renamed(headless, "language/"),),
    )
    LANGUAGE.add(*names)(part)
    FAMILIES.add(*names)(alone)


def dual_encoder_family(
    config_from_hf: Callable[[Any], DualEncoderConfig],
    table: Callable[[DualEncoderConfig], Table],
    *other_tables: Callable[[DualEncoderConfig], Table],
) -> Family:
    """An image encoder and a text encoder."""
    sizes = lambda text: dict(length=text.max_positions, vocabulary=text.vocab_size)
    processor = lambda config, hf, hf_processor: EncoderProcessor(hf_processor, **sizes(config.text.encoder))
    return Family(config_from_hf, lambda config, hf: table(config), processor, other_tables)


def image_tower_family(
    config_from_hf: Callable[[Any], ImageTowerConfig],
    table: Callable[[ImageTowerConfig], Table],
    *other_tables: Callable[[ImageTowerConfig], Table],
) -> Family:
    """An image encoder alone."""
    processor = lambda config, hf, hf_processor: EncoderProcessor(hf_processor)
    return Family(config_from_hf, lambda config, hf: table(config), processor, other_tables)


def text_tower_family(config_from_hf: Callable[[Any], TextTowerConfig], table: Callable[[TextTowerConfig], Table]) -> Family:
    """A text encoder alone."""
    sizes = lambda text: dict(length=text.max_positions, vocabulary=text.vocab_size)
    processor = lambda config, hf, tokenizer: EncoderProcessor(tokenizer, **sizes(config.encoder), pads_to=PADDED_TO)
    return Family(config_from_hf, lambda config, hf: table(config), processor)


def class_token_family(config_from_hf: Callable[[Any], VitConfig], *tables: Callable[[VitConfig], Table]) -> Family:
    """An image encoder whose class token stands for the image.

    Args:
      tables: of the encoder; the first is written.
    """
    under = lambda table: lambda config: table(config.encoder).under(ours="encoder/")
    tower = lambda hf: ImageTowerConfig(encoder=config_from_hf(hf), pool="class_token")
    return image_tower_family(tower, *map(under, tables))


def open_published(name: str | Path, *, pickles: bool = False, pad_to_square: bool = False) -> Checkpoint:
    """Finds (or fetches) a checkpoint and reads everything except its weights.

    Args:
      pickles: whether PyTorch's pickles may be read; nothing in them is executed.
      pad_to_square: LLaVA-1.5 only, see `PublishedMedia.background`.

    Raises:
      PublishedError: it is missing or damaged; ChecksumError: it is not what `api.export` wrote; ValueError: an unsupported
        setting in its configuration.
    """
    path = find(name, pickles=pickles)
    check_folder(path, weights=False)
    family = FAMILIES[known_type(path, FAMILIES)] if path.is_dir() else None
    if pad_to_square and not (family and family.pads_to_square):
        raise PublishedError(f"{path}: only LLaVA-1.5 was evaluated with pictures padded to squares")
    return family.open(path, pickles=pickles, pad_to_square=pad_to_square) if family else FILES[path.suffix](path)


def open_processor(folder: Path) -> Processor:
    """The processing that was kept with a run (`Checkpoint.keep_files`), without any weights.

    Raises:
      PublishedError: it is missing or damaged.
    """
    if (folder / "config.json").is_file():
        return FAMILIES[known_type(folder, FAMILIES)].open_processor(folder)
    return language_processor(read_processor(folder, vision=False))  # of a checkpoint in one file


def language_processor(tokenizer: Any) -> PublishedProcessor:
    """The processor of a language model, from transformers' tokenizer."""
    return PublishedProcessor(tokenizer, {tokenizer.eos_token_id} - {None}, Settings())


def read_processor(folder: Path, *, vision: bool, hf_config: Any = None) -> Any:
    """transformers' processor, or its tokenizer alone.

    Args:
      hf_config: of `read_config`; None: the tokenizer reads the folder's.

    Raises:
      PublishedError: it is missing or damaged.
    """
    check_processing(folder)
    from transformers import AutoProcessor, AutoTokenizer

    with refused(f"{folder}: its {'processor and tokenizer' if vision else 'tokenizer'} cannot be read"):
        try:
            if vision:
                # The slow processors: the fast ones need torchvision.
                found = AutoProcessor.from_pretrained(folder, backend="pil", trust_remote_code=False)
            else:
                found = AutoTokenizer.from_pretrained(folder, config=hf_config, trust_remote_code=False)
        except ImportError as error:  # SigLIP's tokenizer
            needed = " ".join(str(error).split())[:200]
            raise ImportError(f"{needed}; pip install 'vlm_jax[sentencepiece]' has it") from error
    if vision and not hasattr(getattr(found, "image_processor", found), "do_normalize"):
        raise PublishedError(f"{folder}: {type(found).__name__} is no picture processor; fetch its settings again")
    check_tokenizer(folder, getattr(found, "tokenizer", found))
    return found


def _pixels(image_processor: Any) -> dict[str, tuple[float, ...]]:
    """The mean and deviation that the vision encoder normalises with.

    Raises:
      PublishedError: a processor that makes other numbers of the pixels.
    """
    if not (image_processor.do_rescale and image_processor.do_normalize and image_processor.rescale_factor == 1 / 255):
        raise PublishedError(
            f"{type(image_processor).__name__}: do_rescale={image_processor.do_rescale}, "
            f"rescale_factor={image_processor.rescale_factor}, do_normalize={image_processor.do_normalize}; only pixels from "
            "0 to 1 that are normalised are implemented"
        )
    return {"mean": tuple(image_processor.image_mean), "std": tuple(image_processor.image_std)}


def _generation(folder: Path, hf_config: Any, tokenizer: Any) -> tuple[set[int], Settings]:
    """The end tokens and the settings of `generation_config.json`.

    Raises:
      PublishedError: it is damaged, or a setting has a value that it cannot have.
    """
    path = folder / "generation_config.json"
    said = read_settings(path) if path.exists() else {}
    check_settings(path, said, bounds.GENERATION)
    text_config = hf_config.get_text_config()
    candidates = (said.get("eos_token_id"), getattr(text_config, "eos_token_id", None), tokenizer.eos_token_id)
    end = next((value for value in candidates if value is not None), None)
    ends = set(end) if isinstance(end, list) else {end} - {None}
    if not ends:
        log.warning("%s: neither a configuration nor the tokenizer names an end token: answers end at max_new_tokens", folder)
    ignored = [name for name in UNSUPPORTED_SETTINGS if said.get(name) not in UNSUPPORTED_SETTINGS[name]]
    if ignored:
        log.warning("%s: %s: not implemented, answers may differ", path, ", ".join(f"{name}={said[name]}" for name in ignored))
    settings: dict[str, Any] = {}
    samples = bool(said.get("do_sample"))
    if samples:
        if wrong := [f"{name}={said[name]}" for name in ("temperature", "top_p") if said.get(name) == 0]:
            raise PublishedError(f"{path}: {wrong[0]} with do_sample=true: expected a number above 0, or do_sample=false")
        settings = {"temperature": said.get("temperature") or 1.0, "top_k": said.get("top_k", 50) or 0}
        settings["top_p"] = said.get("top_p") or 1.0
    # Beam sampling is not supported; plain sampling is used instead.
    settings["beams"] = 1 if samples else said.get("num_beams") or 1
    settings["early_stopping"] = said.get("early_stopping") is True
    for name in ("max_new_tokens", "repetition_penalty", "length_penalty"):
        if said.get(name) is not None:
            settings[name] = said[name]
    made = Settings(**settings)
    if said.get("max_length") is not None and "max_new_tokens" not in settings:
        log.warning(
            "%s: max_length=%s counts the prompt too and is not implemented: answers end after max_new_tokens=%s",
            path,
            said["max_length"],
            made.max_new_tokens,
        )
    return ends, made
