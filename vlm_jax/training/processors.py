"""The processor of a run, used in training and in inference: kept in its folder.

RUN/processor/   of a published checkpoint (`config.data.processor`): tokenizer, chat template, picture processor
RUN/tokenizer/   of a recipe: the tokenizer, as transformers saves it
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax

from vlm_jax.config import DataConfig
from vlm_jax.data.example import Source
from vlm_jax.errors import DataError
from vlm_jax.interop.files.folder import PACKAGE, find
from vlm_jax.interop.files.settings import read_settings
from vlm_jax.interop.published import open_processor, open_published
from vlm_jax.processing.media import FittedMedia, PublishedMedia
from vlm_jax.processing.pair import PairProcessor, caption_of, ended
from vlm_jax.processing.processor import Processor
from vlm_jax.processing.recipe import RecipeProcessor, texts_of
from vlm_jax.processing.templates import LINE, named_template
from vlm_jax.processing.tokenizer import (
    EOC,
    Tokenizer,
    TokenizerError,
    load_fast,
    load_tokenizer,
    save_tokenizer,
    train_tokenizer,
)

PROCESSOR, TOKENIZER = "processor", "tokenizer"
TEMPLATE = "chat_template.jinja"  # the name that transformers reads
PADDED = {"image_processor_type": "LlavaImageProcessor", "do_pad": True}  # transformers' own way to LLaVA's expand2square


def build_processor(config: DataConfig, source: Source, folder: Path, *, pickles: bool = False) -> Processor:
    """The processor of a run that starts: read from its folder, or made and kept there.

    Raises:
      TokenizerError, PublishedError, DataError: it cannot be had.
    """
    if config.processor:
        if not (folder / PROCESSOR).is_dir() and jax.process_index() == 0:
            published = open_published(config.processor, pickles=pickles, pad_to_square=config.pad_to_square)
            _check_layout(config, published.processor)
            part = folder / f".{PROCESSOR}.part"
            published.keep_files(part)
            write_processing(config, part)
            part.rename(folder / PROCESSOR)
        _wait()
        processor = run_processor(config, folder)
        if config.template and getattr(processor, "template", "") != named_template(config.template):
            raise DataError(f"data.template={config.template}: {config.processor} reads no chat template: leave it out")
        return processor
    if not (folder / TOKENIZER / "tokenizer.json").is_file():
        if config.layout == "pair":
            save_tokenizer(_pair_tokenizer(config, source), folder / TOKENIZER)
        else:
            _tokenizer(config, source).save(folder / TOKENIZER)
    return run_processor(config, folder)


def _check_layout(config: DataConfig, processor: Any) -> None:
    """
    Raises:
      DataError: a processor of the other kind than the data's layout.
    """
    if processor.answers and config.layout == "pair":
        raise DataError(f"data.processor={config.processor}: this checkpoint is no pair of encoders, as data.layout=pair needs")
    if not processor.answers and config.layout != "pair":
        raise DataError(
            f"data.processor={config.processor}: this checkpoint is an encoder: it reads no conversations (data.layout=pair)"
        )
    if not processor.answers and not processor.has_text:
        raise DataError(f"data.processor={config.processor}: this checkpoint has no text encoder")


def write_processing(config: DataConfig, folder: Path) -> None:
    """Changes a checkpoint's processing as the run has it, in the files where transformers reads it.

    Raises:
      RequestError: there is no chat template of that name; PublishedError: a damaged file.
    """
    if config.template == LINE:
        _end_with_a_line(folder)
    if config.template:
        (folder / TEMPLATE).write_text(named_template(config.template))
        (folder / "chat_template.json").unlink(missing_ok=True)
        for name in ("processor_config.json", "tokenizer_config.json"):
            _change(folder / name, lambda settings: settings.pop("chat_template", None))
    if config.pad_to_square:
        _change(folder / "processor_config.json", lambda settings: settings.get("image_processor", {}).update(PADDED))
        _change(folder / "preprocessor_config.json", lambda settings: settings.update(PADDED))


def _end_with_a_line(folder: Path) -> None:
    """The line break becomes the end token, where transformers looks for it: it is learned behind a caption, as LLaVA has it.

    Raises:
      DataError: the tokenizer has no token for a line break.
    """
    tokenizer = load_fast(folder)
    *_, last = tokenizer.encode("a\n", add_special_tokens=False)
    if tokenizer.decode([last]) != "\n":
        raise DataError(
            f"data.template={LINE}: the tokenizer has no token for a line break, which ends a caption: leave it out"
        )
    path = folder / "generation_config.json"
    settings = read_settings(path) if path.is_file() else {}
    path.write_text(json.dumps(settings | {"eos_token_id": last}, indent=2) + "\n")


def _change(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    if path.is_file():
        settings = read_settings(path)
        change(settings)
        path.write_text(json.dumps(settings, indent=2) + "\n")


def run_processor(config: DataConfig, folder: Path) -> Processor:
    """The processor that a run's folder holds.

    Raises:
      TokenizerError, PublishedError: it is damaged.
    """
    if config.layout == "pair":
        return _pair_processor(config, folder)
    if config.processor:
        return open_processor(folder / PROCESSOR)
    return RecipeProcessor(load_tokenizer(folder / TOKENIZER, config.end), config)


def _pair_processor(config: DataConfig, folder: Path) -> PairProcessor:
    options = dict(length=config.tokens, truncates=config.too_long == "truncate", blind=config.blank_images)
    if not config.processor:
        media = FittedMedia(config.image_size, fit=config.image_fit, tile_tokens=0, blank=config.blank_images)
        return PairProcessor(load_fast(folder / TOKENIZER), media, **options)
    hf_processor = open_processor(folder / PROCESSOR).hf_processor
    media = PublishedMedia(hf_processor.image_processor, side=config.image_size, tile_tokens=0)
    return PairProcessor(hf_processor.tokenizer, media, **options)


def _pair_tokenizer(config: DataConfig, source: Source) -> Any:
    """The text tower's own tokenizer, or one that is trained on the captions."""
    if config.tokenizer == "train":
        return ended(train_tokenizer(_texts(config, source), config.vocab_size).hf_tokenizer)
    packaged = config.tokenizer.startswith(PACKAGE)
    return load_fast(find(config.tokenizer) if packaged else config.tokenizer)


def _wait() -> None:
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices("processor")


def _tokenizer(config: DataConfig, source: Source) -> Tokenizer:
    """Reads `config.tokenizer`, or trains one on the source's texts if that is "train"."""
    if config.tokenizer != "train":
        return read_tokenizer(config.tokenizer, config.end)
    if config.end != EOC:
        raise TokenizerError(f"data.end={config.end!r} is for a published tokenizer; a trained one has {EOC!r}")
    return train_tokenizer(_texts(config, source), config.vocab_size)


def _texts(config: DataConfig, source: Source) -> Iterator[str]:
    for index in range(len(source)):
        try:
            conversations = source[index].conversations
        except DataError:
            if config.source.bad_lines == "error":
                raise
            continue  # it is reported where the data are tokenised
        for conversation in conversations:
            yield from [caption_of(conversation)] if config.layout == "pair" else texts_of(conversation, config)


def read_tokenizer(name: str | Path, end: str) -> Tokenizer:
    """`load_tokenizer`, and that of a GGUF file, an OpenFlamingo folder, or a package that brings weights.

    Raises:
      TokenizerError, PublishedError: it cannot be had.
    """
    path = Path(name).expanduser()
    inside = str(name).startswith(PACKAGE) or path.suffix == ".gguf"
    if inside or ((path / "config.json").is_file() and not (path / "tokenizer.json").is_file()):
        processor = open_published(name).processor
        if not processor.answers:
            raise TokenizerError(f"data.tokenizer={name}: this checkpoint writes no texts")
        return Tokenizer(processor.tokenizer.hf_tokenizer, end)
    return load_tokenizer(name, end)
