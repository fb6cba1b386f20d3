"""Published checkpoints in and out: a folder -> model, parameters and processor, and back."""

from __future__ import annotations

import dataclasses
import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from vlm_jax.config import DualEncoderConfig, ImageTowerConfig, ModelConfig, VitConfig
from vlm_jax.config.generation import Settings
from vlm_jax.errors import first_line
from vlm_jax.interop import safetensors_files
from vlm_jax.interop.encoder_processor import EncoderProcessor
from vlm_jax.interop.engine import boxed_params, load_params, names_known, published_tensors
from vlm_jax.interop.families import FAMILIES, Config, Family
from vlm_jax.interop.folder import check_tokenizer, find, model_type, new_folder, open_weights, read_config
from vlm_jax.interop.gguf_checkpoint import GgufCheckpoint
from vlm_jax.interop.onnx_dinov2 import OnnxDinov2
from vlm_jax.interop.openflamingo_checkpoint import MODEL_TYPE, OpenFlamingo, openflamingo_processor
from vlm_jax.interop.source import PublishedError
from vlm_jax.interop.table import Table
from vlm_jax.models.dual_encoder import DualEncoder, ImageTower
from vlm_jax.models.vlm import VisionLanguageModel
from vlm_jax.processing.processor import Processor
from vlm_jax.processing.published import PublishedProcessor

log = logging.getLogger(__name__)

# Of generation_config.json, what changes answers and is not implemented, with the values that change nothing.
UNKNOWN_SETTINGS: dict[str, tuple[Any, ...]] = {
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
MODELS = {ModelConfig: VisionLanguageModel, DualEncoderConfig: DualEncoder, ImageTowerConfig: ImageTower}


@dataclasses.dataclass(frozen=True)
class Published:
    """A published checkpoint whose configuration is read and whose weights are not yet."""

    folder: Path
    hf_config: Any  # transformers'
    family: Family
    config: Config
    processor: PublishedProcessor | EncoderProcessor
    pickles: bool

    def load_params(self, mesh: Mesh, dtype: Any = None, tell: Callable[[int, int], None] = lambda done, total: None) -> Any:
        """Its parameters, each on the devices that `sharding.RULES` give it; see `engine.load_params`."""
        source = open_weights(self.folder, self.pickles)
        tables = (self.table, *(table(self.config) for table in self.family.other_tables))
        table = max(tables, key=lambda table: names_known(table, source))
        return load_params(source, table, boxed_params(MODELS[type(self.config)](self.config)), mesh, dtype, tell)

    @property
    def table(self) -> Table:
        """The names that are written."""
        return self.family.table(self.config, self.hf_config)

    def export(self, params: Any, folder: str | Path) -> int:
        """Writes a folder that transformers loads: `params`, and this checkpoint's configuration, tokenizer and processor.

        Returns:
          the bytes of the weights.

        Raises:
          PublishedError: the folder holds something already; ConversionError: the parameters are not of this model.
        """
        target = new_folder(folder)
        written = safetensors_files.write(target, published_tensors(params, self.table))
        self.keep_files(target)
        path = target / "config.json"
        config = json.loads(path.read_text())
        held = str(jax.tree.leaves(params)[0].dtype)
        if config.get("dtype", held) != held:
            path.write_text(json.dumps(config | {"dtype": held}, indent=2) + "\n")
        return written

    def keep_files(self, folder: Path) -> None:
        """Copies everything but the weights."""
        folder.mkdir(parents=True, exist_ok=True)
        for file in self.folder.iterdir():
            if file.suffix in (".json", ".jinja", ".model", ".txt") and ".index." not in file.name:
                shutil.copyfile(file, folder / file.name)


Checkpoint = Published | OpenFlamingo | GgufCheckpoint | OnnxDinov2  # what can be read, each with the methods of the first


def open_published(name: str | Path, pickles: bool = False, pad_to_square: bool = False) -> Checkpoint:
    """Finds (or fetches) a checkpoint and reads all of it but the weights.

    Args:
      pad_to_square: LLaVA-1.5 alone, see `PublishedMedia.background`.

    Raises:
      PublishedError: it is missing or damaged; ValueError: a setting in its configuration that is not implemented.
    """
    folder = find(name, pickles)
    if pad_to_square and (folder.is_file() or model_type(folder) != "llava"):
        raise PublishedError(f"{folder}: only LLaVA-1.5 was evaluated with pictures padded to squares")
    if folder.is_file():
        return OnnxDinov2(folder) if folder.suffix == ".onnx" else GgufCheckpoint(folder)
    if model_type(folder) == MODEL_TYPE:
        return OpenFlamingo(folder, pickles)
    hf_config = read_config(folder, FAMILIES)
    family = FAMILIES[hf_config.model_type]
    try:
        config = family.config_from_hf(hf_config)
    except ValueError as error:
        raise PublishedError(f"{folder / 'config.json'}: {error}") from error
    answers = isinstance(config, ModelConfig)
    wrapped = _processor(folder, vision=not answers or config.vision is not None)
    if not answers or config.vision is not None:
        config = _with_pixels(config, _pixels(getattr(wrapped, "image_processor", wrapped)))
    settings = _generation(folder, hf_config, getattr(wrapped, "tokenizer", wrapped)) if answers else ()
    processor = family.processor(config, hf_config, wrapped, *settings)
    if pad_to_square:
        background = tuple(int(255 * mean) for mean in config.vision.mean)
        media = dataclasses.replace(processor.media, background=background)
        processor.spread = dataclasses.replace(processor.spread, media=media)
    return Published(folder, hf_config, family, config, processor, pickles)


def open_processor(folder: Path) -> Processor:
    """The processing that was kept with a run (`keep_files`), without any weights.

    Raises:
      PublishedError: it is missing or damaged.
    """
    if not (folder / "config.json").is_file():  # of a GGUF file
        tokenizer = _processor(folder, vision=False)
        return PublishedProcessor(tokenizer, {tokenizer.eos_token_id} - {None}, Settings())
    if model_type(folder) == MODEL_TYPE:
        return openflamingo_processor(folder)
    return open_published(folder).processor


def _with_pixels(config: Any, pixels: dict[str, tuple[float, ...]]) -> Any:
    """The configuration with this mean and deviation in its vision encoder."""
    if isinstance(config, VitConfig):
        return dataclasses.replace(config, **pixels)
    part = {ModelConfig: "vision", DualEncoderConfig: "image", ImageTowerConfig: "encoder"}[type(config)]
    return dataclasses.replace(config, **{part: _with_pixels(getattr(config, part), pixels)})


def _processor(folder: Path, *, vision: bool) -> Any:
    from transformers import AutoProcessor, AutoTokenizer

    try:
        if vision:
            # The slow processors: the fast ones need torchvision.
            found = AutoProcessor.from_pretrained(folder, backend="pil", trust_remote_code=False)
        else:
            found = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except ImportError as error:  # SigLIP's tokenizer
        needed = " ".join(str(error).split())[:200]
        raise PublishedError(f"{folder}: {needed}; pip install 'vlm_jax[sentencepiece]' has it") from error
    except Exception as error:  # whatever a missing or wrong file makes transformers raise
        cause = first_line(error)
        what = "processor and tokenizer" if vision else "tokenizer"
        raise PublishedError(f"{folder}: its {what} cannot be read ({cause})") from error
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
    """The end tokens and the settings of `generation_config.json`."""
    path = folder / "generation_config.json"
    try:
        said = json.loads(path.read_text()) if path.is_file() else {}
    except ValueError as error:
        raise PublishedError(f"{path} is damaged ({error}); fetch it again") from error
    text_config = hf_config.get_text_config()
    candidates = (said.get("eos_token_id"), text_config.eos_token_id, tokenizer.eos_token_id)
    end = next((value for value in candidates if value is not None), None)
    ends = set(end) if isinstance(end, list) else {end} - {None}
    ignored = [name for name in UNKNOWN_SETTINGS if said.get(name) not in UNKNOWN_SETTINGS[name]]
    if ignored:
        log.warning("%s: %s: not implemented, answers may differ", path, ", ".join(f"{name}={said[name]}" for name in ignored))
    settings: dict[str, Any] = {}
    samples = bool(said.get("do_sample"))
    if samples:
        settings = {"temperature": said.get("temperature") or 1.0, "top_k": said.get("top_k", 50) or 0}
        settings["top_p"] = said.get("top_p") or 1.0
    # Beams that are sampled are not implemented: sampling it is then.
    settings["beams"] = 1 if samples else said.get("num_beams") or 1
    settings["early_stopping"] = said.get("early_stopping") is True
    for name in ("max_new_tokens", "repetition_penalty", "length_penalty"):
        if said.get(name) is not None:
            settings[name] = said[name]
    return ends, Settings(**settings)
