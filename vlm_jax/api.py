"""The Python API: load a checkpoint, ask it.

import vlm_jax

vlm = vlm_jax.load("runs/flamingo")
print(vlm.generate("what color is the shape?", images=["picture.png"]))
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from vlm_jax.config import MeshConfig
from vlm_jax.config.generation import Settings
from vlm_jax.encoders import Encoder
from vlm_jax.errors import RequestError
from vlm_jax.files import write_checksums
from vlm_jax.generation.attention_map import AttentionMaps, attention_maps, check_visible
from vlm_jax.generation.generator import Answer, Generator
from vlm_jax.generation.request import Request, chat_request
from vlm_jax.interop.checkpoint import Checkpoint
from vlm_jax.interop.files.folder import is_published
from vlm_jax.interop.peft_read import load_adapters
from vlm_jax.interop.published import open_published
from vlm_jax.layers.lora import merged, names_of, with_adapters, without_adapters
from vlm_jax.processing.conversation import Shot, from_prompt
from vlm_jax.processing.pictures import Picture
from vlm_jax.sharding import AXES, make_mesh
from vlm_jax.training.run_checkpoint import RunCheckpoint

DTYPES = ("float32", "bfloat16")


class Vlm:
    """A model that answers questions about images.

    Everywhere, `images` are files, their bytes, PIL images or arrays [height, width, 3] uint8: one, or a list of them; a list
    inside the list is a video. They come before the prompt, or where the prompt says `<image>`. `examples` are `Shot`s or
    (images, question, answer) triples. Further arguments are those of `Settings`: max_new_tokens, temperature, top_k, top_p,
    repetition_penalty, beams, length_penalty, early_stopping, stop, seed; the defaults are the checkpoint's own.

    Attributes:
      checkpoint: what it was loaded from; generator: for batches of `Request`s; model, params, processor: its parts; mesh: the
        devices.
    """

    def __init__(
        self, checkpoint: RunCheckpoint | Checkpoint, generator: Generator, adapters: Mapping[str, Any] | None = None
    ) -> None:
        """
        Args:
          adapters: further ones by name, not active; see `with_adapters`.
        """
        self.checkpoint, self.generator = checkpoint, generator
        self._all, self._loaded = generator.programs.held, adapters or {}
        self.model, self.processor, self.mesh = generator.model, generator.processor, generator.mesh

    @property
    def params(self) -> Any:
        """Nested dicts on the mesh, layers stacked. Of a large model it is a copy: take it once."""
        return self.generator.params

    @property
    def adapters(self) -> tuple[str, ...]:
        """The names of all adapters: the run's own, and those that were loaded."""
        return (*names_of(self._all), *self._loaded)

    def with_adapters(self, *names: str) -> Vlm:
        """The same model with these adapters and no others; without a name the base model. The base's arrays are shared.

        Raises:
          RequestError: there is none of the name.
        """
        if unknown := [name for name in names if name not in self.adapters]:
            raise RequestError(f"no adapter {unknown[0]!r}; there are {', '.join(self.adapters) or 'none'}")
        params = without_adapters(self._all, names)
        for name in names:
            params = with_adapters(params, self._loaded.get(name, {}))
        other = Vlm(self.checkpoint, self.generator.with_params(params), self._loaded)
        other._all = self._all
        return other

    def settings(self, **changes: Any) -> Settings:
        """The checkpoint's own settings with some changed."""
        return self.processor.defaults.changed(**changes)

    def generate(self, prompt: str, images: Sequence[Picture] = (), examples: Sequence[Any] = (), **settings: Any) -> str:
        """The answer.

        Raises:
          RequestError: the request does not fit the model; ImageError: an image cannot be read.
        """
        return self.answer([self.request(prompt, images, examples)], **settings)[0].text

    def chat(self, messages: Sequence[dict[str, Any]], **settings: Any) -> str:
        """The assistant's next turn in a chat.

            question = [{"type": "image", "image": "a.jpg"}, {"type": "text", "text": "What is this?"}]
            vlm.chat([{"role": "user", "content": question},
                      {"role": "assistant", "content": "A cat."},
                      {"role": "user", "content": "Which colour?"}])

        Args:
          messages: `processing/conversation.py` describes them.

        Raises:
          RequestError: a malformed message, or a chat that the template refuses; ImageError: an image cannot be read.
        """
        return self.answer([chat_request(messages)], **settings)[0].text

    def answer(self, requests: Sequence[Request], **settings: Any) -> list[Answer]:
        """The answers to many requests, with tokens, log-probabilities and why each ended.

        Raises:
          RequestError: not a list of requests, or one that does not fit the model; ImageError: an image cannot be read.
        """
        given = list(requests) if isinstance(requests, list | tuple) else [requests]
        wrong = [f"{one!r:.60}" for one in given if not isinstance(one, Request)]
        if wrong:
            raise RequestError(
                f"answer() expects Request objects, got {wrong[0]}; build one with vlm.request({wrong[0]}), or ask a "
                "single question with vlm.generate(...) or vlm.chat(...)"
            )
        return self.generator.generate(given, self.settings(**settings))

    def stream(
        self, prompt: str, images: Sequence[Picture] = (), examples: Sequence[Any] = (), **settings: Any
    ) -> Iterator[str]:
        """Yields the answer piece by piece as it is generated."""
        yield from self.generator.stream(self.request(prompt, images, examples), self.settings(**settings))

    def attention(
        self, prompt: str, images: Sequence[Picture], examples: Sequence[Any] = (), **settings: Any
    ) -> tuple[str, AttentionMaps]:
        """The answer, and the attention over the images for each word of it; `.save("out.png")` draws it."""
        return self.attention_for_request(self.request(prompt, images, examples), **settings)

    def attention_for_request(self, request: Request, **settings: Any) -> tuple[str, AttentionMaps]:
        """`attention` of a request."""
        check_visible(self.generator, request)
        answer = self.answer([request], **settings)[0]
        return answer.text, attention_maps(self.generator, request, answer)

    def request(
        self, prompt: str, images: Sequence[Picture] = (), examples: Sequence[Any] = (), seed: int | None = None
    ) -> Request:
        """One of the requests of `answer`."""
        return Request(*from_prompt(prompt, _as_list(images), [_shot(example) for example in examples]), seed)


def _shot(example: Any) -> Shot:
    if not isinstance(example, Shot):
        if not isinstance(example, list | tuple) or len(example) != 3:
            raise RequestError(f"examples: {example!r:.60}: expected (images, question, answer)")
        example = Shot(*example)
    return dataclasses.replace(example, images=_as_list(example.images))


def _as_list(images: Any) -> list[Any]:
    """A single image as a list."""
    if images is None:
        return []
    if isinstance(images, Picture):
        return [images]
    if not isinstance(images, Iterable) or isinstance(images, Mapping):
        raise RequestError(f"images={images!r:.60}: expected a picture, or a list of them")
    return list(images)


def open_checkpoint(
    path: str | Path, step: int | None = None, *, pickles: bool = False, pad_to_square: bool = False
) -> RunCheckpoint | Checkpoint:
    """Reads everything in a checkpoint except its weights; for the arguments see `load`."""
    if is_published(path):
        return open_published(path, pickles=pickles, pad_to_square=pad_to_square)
    if pad_to_square:
        raise RequestError(f"{path} is a run of train.py: its images are fitted as config.data.image_fit says")
    return RunCheckpoint(Path(path).expanduser(), step)


def load(
    path: str | Path | RunCheckpoint | Checkpoint,
    mesh: str | None = None,
    *,
    dtype: str | None = None,
    step: int | None = None,
    rows: int = 16,
    pickles: bool = False,
    pad_to_square: bool = False,
    adapters: Mapping[str, str | Path] | None = None,
    merge_adapters: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Vlm | Encoder:
    """Reads a run of train.py (its `--workdir`) or a published checkpoint.

    A model that answers questions is a `Vlm`; CLIP, SigLIP and image encoders are an `Encoder`.

    Args:
      path: a run's folder; a folder saved by transformers, or the cache folder of a hub repository; or the repository's
        name, "llava-hf/llava-1.5-7b-hf"; or the result of `open_checkpoint`.
      mesh: how to shard the model over the devices, "tensor=8" or "data=2,tensor=4"; None: only the first device.
      dtype: "float32" or "bfloat16"; None: the run's own, or bfloat16 on GPU and TPU if it does not say.
      step: which checkpoint of a run; None: the newest.
      rows: maximum number of requests answered at once.
      pickles: whether PyTorch's `.bin` files may be read; nothing in them is executed.
      pad_to_square: LLaVA-1.5 only: images are padded to squares first, as its authors evaluated it; transformers does not.
      adapters: folders of adapters in PEFT's format, by a name of your own; the first is active, `Vlm.with_adapters` chooses.
        A run's own are active too.
      merge_adapters: whether the active ones are added to the kernels, which is faster, and final.
      progress: called with the bytes read so far and in total, for a published checkpoint.

    Raises:
      ValueError: no checkpoint or adapter, a damaged one, or an invalid mesh or dtype; the message says which.
    """
    if dtype is not None and dtype not in DTYPES:
        raise RequestError(f"dtype {dtype!r}: expected one of {', '.join(DTYPES)}")
    device_mesh = parse_mesh(mesh)
    given = isinstance(path, str | Path)
    checkpoint = open_checkpoint(path, step, pickles=pickles, pad_to_square=pad_to_square) if given else path
    with jax.set_mesh(device_mesh):
        model, params = checkpoint.load(device_mesh, dtype, progress=progress)
        options = dict(known=names_of(params), mesh=device_mesh, pickles=pickles)
        loaded = load_adapters(model, checkpoint.adapter_tables, adapters or {}, **options)
        if merge_adapters:
            first = next(iter(loaded.values()), {})
            params, loaded = jax.jit(lambda params, first: merged(with_adapters(params, first)))(params, first), {}
    if not checkpoint.processor.answers:
        return Encoder(checkpoint, model, params, mesh=device_mesh, rows=rows)
    vlm = Vlm(checkpoint, Generator(model, params, checkpoint.processor, device_mesh, rows), loaded)
    return vlm.with_adapters(*options["known"], next(iter(loaded))) if loaded else vlm


def export(
    path: str | Path, folder: str | Path, *, step: int | None = None, mesh: str | None = None, adapter: str | None = None
) -> int:
    """Writes a trained model as a folder that transformers loads with `from_pretrained`; or one of its adapters, for PEFT.

    A whole model is written with its adapters merged, and int8 kernels as float32.

    It gets a file `checksums.sha256`, and is read here only as long as it is what was written.

    Args:
      path: a run started from a published checkpoint (`config.init_from`), or such a checkpoint itself.
      folder: a new one.
      step: which checkpoint of the run; None: the newest.
      mesh: as in `load`, for a model too large for one device.
      adapter: of a run: the name of the adapter that is written alone, with the parameters that were trained beside it.

    Returns:
      the bytes of the weights.

    Raises:
      ValueError: no checkpoint, one without a transformers format, or a folder that is not empty.
    """
    device_mesh = parse_mesh(mesh)
    checkpoint = open_checkpoint(path, step)
    with jax.set_mesh(device_mesh):
        if adapter is None:
            written = checkpoint.convert(folder, device_mesh)
        elif isinstance(checkpoint, RunCheckpoint):
            written = checkpoint.write_adapter(folder, adapter, device_mesh)
        else:
            raise RequestError(f"adapter={adapter!r}: {path} is a published checkpoint, and has no adapters")
    write_checksums(Path(folder).expanduser())
    return written


def parse_mesh(text: str | None) -> Mesh:
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
