"""What a user touches: load a run, ask it.

import vlm_jax

vlm = vlm_jax.load("runs/flamingo")
print(vlm.generate("what color is the shape?", images=["picture.png"]))
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax

from vlm_jax.config import MeshConfig, RunConfig
from vlm_jax.data.tokenizer import load_tokenizer
from vlm_jax.generation.attention_map import AttentionMaps, attention_maps, check_visible
from vlm_jax.generation.generator import Answer, Generator
from vlm_jax.generation.processor import RunProcessor
from vlm_jax.generation.request import Picture, Request, RequestError, Settings, Shot
from vlm_jax.models.vlm import VisionLanguageModel
from vlm_jax.sharding import AXES, make_mesh
from vlm_jax.training.checkpoint import load_run, read_config
from vlm_jax.training.step import compute_dtype

DTYPES = ("float32", "bfloat16")


class Vlm:
    """A trained model that answers questions about pictures.

    Everywhere, `images` are files, their bytes, PIL images or arrays [H, W, 3] uint8; a list in the place of one is a film.
    They stand before the prompt, or where the prompt says `<image>`. `examples` are `Shot`s or (images, question, answer)
    triples. Further arguments are those of `Settings`: max_new_tokens, temperature, top_k, top_p, stop, seed.

    Attributes:
      config: of the run; step: of its checkpoint; generator: for batches of `Request`s.
    """

    def __init__(self, config: RunConfig, generator: Generator, step: int) -> None:
        self.config, self.generator, self.step = config, generator, step

    def generate(self, prompt: str, images: Sequence[Picture] = (), examples: Sequence[Any] = (), **settings: Any) -> str:
        """The answer.

        Raises:
          RequestError: what was asked does not fit the model; ImageError: a picture cannot be read.
        """
        return self.answer([self.request(prompt, images, examples)], **settings)[0].text

    def answer(self, requests: Sequence[Request], **settings: Any) -> list[Answer]:
        """The answers to many requests, with tokens, log-probabilities and why each ended."""
        return self.generator.generate(list(requests), Settings(**settings))

    def stream(
        self, prompt: str, images: Sequence[Picture] = (), examples: Sequence[Any] = (), **settings: Any
    ) -> Iterator[str]:
        """The answer piece by piece, while it is generated; on one device only."""
        yield from self.generator.stream(self.request(prompt, images, examples), Settings(**settings))

    def attention(
        self, prompt: str, images: Sequence[Picture], examples: Sequence[Any] = (), **settings: Any
    ) -> tuple[str, AttentionMaps]:
        """The answer, and where in the pictures the model looked for every word of it; `.save("out.png")` draws it."""
        request = self.request(prompt, images, examples)
        check_visible(self.generator, request)
        answer = self.answer([request], **settings)[0]
        return answer.text, attention_maps(self.generator, request, answer)

    def request(
        self, prompt: str, images: Sequence[Picture] = (), examples: Sequence[Any] = (), seed: int | None = None
    ) -> Request:
        """One of the requests of `answer`."""
        if isinstance(images, str | Path | bytes):
            raise RequestError(f"images={images!r}: expected a list of pictures; put it in brackets")
        shots = [shot if isinstance(shot, Shot) else Shot(*shot) for shot in examples]
        return self.generator.processor.ask(prompt, list(images), shots, seed)


def load(path: str | Path, mesh: str | None = None, dtype: str | None = None, step: int | None = None, rows: int = 16) -> Vlm:
    """Reads a run's folder (the `--workdir` of train.py).

    Args:
      mesh: how to spread the model over the devices, "tensor=8" or "data=2,tensor=4"; None: the first device alone.
      dtype: "float32" or "bfloat16"; None: the run's own, bfloat16 on GPU and TPU where the run left it to us.
      step: which checkpoint; None: the newest.
      rows: at most so many requests are answered at once.

    Raises:
      ValueError: no run, no checkpoint, or a mesh or dtype that cannot be; the message says which.
    """
    if dtype is not None and dtype not in DTYPES:
        raise RequestError(f"dtype {dtype!r}: expected one of {', '.join(DTYPES)}")
    placed = parse_mesh(mesh)
    compute = compute_dtype(dtype or read_config(path).dtype)
    with jax.set_mesh(placed):
        run = load_run(path, placed, dtype=compute if compute != "float32" or dtype else None, step=step)
    model = VisionLanguageModel(run.config.model, compute)
    processor = RunProcessor(load_tokenizer(run.tokenizer), run.config.data)
    generator = Generator(model, run.params, processor, placed, rows)
    return Vlm(run.config, generator, run.step)


def parse_mesh(text: str | None) -> jax.sharding.Mesh:
    """ "data=2,tensor=4" -> the mesh; None -> one device.

    Raises:
      RequestError: an unknown axis, or sizes that do not fit the devices.
    """
    if text is None:
        return make_mesh(MeshConfig(data=1), jax.devices()[:1])
    sizes: dict[str, int] = {}
    for part in text.split(","):
        name, _, size = (piece.strip() for piece in part.partition("="))
        if name not in AXES or not size.isdecimal() or int(size) < 1 or name in sizes:
            raise RequestError(f"mesh {text!r}: expected sizes for some of {', '.join(AXES)}, as in 'data=2,tensor=4'")
        sizes[name] = int(size)
    try:
        return make_mesh(MeshConfig(**sizes))
    except ValueError:
        raise RequestError(
            f"mesh {text!r} does not fit: there are {len(jax.devices())} devices, and the sizes must multiply to that "
            "(data takes what is left if it is not given)"
        ) from None
