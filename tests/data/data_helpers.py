"""What the tests of the data room share."""

import dataclasses
import functools
import json
import types
from pathlib import Path

import numpy as np
from PIL import Image

from vlm_jax.config import DataConfig, JsonLinesConfig
from vlm_jax.data.build_store import token_store
from vlm_jax.data.example import Example, Source
from vlm_jax.data.pipeline import build_source
from vlm_jax.data.sources.jsonl import JsonLinesSource
from vlm_jax.data.store import TokenStore
from vlm_jax.processing.layout import Runs
from vlm_jax.processing.media import FittedMedia, Medium
from vlm_jax.processing.pictures import Size, read_image
from vlm_jax.processing.recipe import RecipeProcessor, texts_of
from vlm_jax.processing.tokenizer import Tokenizer, train_tokenizer


def write_lines(path: Path, records: list) -> Path:
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in records))
    return path


def picture(path: Path, colour=(200, 30, 10), size=(8, 8)) -> Path:
    Image.new("RGB", size, colour).save(path)
    return path


def random_pixels(height: int, width: int, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, channels)).astype(np.uint8)


def run_config(data: DataConfig, steps=6, seed=0):
    """The fields of RunConfig that are read here."""
    return types.SimpleNamespace(data=data, seed=seed, steps=steps)


@functools.cache
def byte_tokenizer() -> Tokenizer:
    """A token a byte, so that lengths can be counted by hand."""
    return train_tokenizer([], 261)


@dataclasses.dataclass(frozen=True)
class Tiled(FittedMedia):
    """A picture is cut into tiles of its rows of 8 pixels, of two visual tokens each."""

    def runs(self, size: Size) -> Runs:
        return (np.arange(2 * self.tiles(size)),)

    def tiles(self, size: Size) -> int:
        return size[0] // 8

    def pixels(self, medium: Medium) -> list[np.ndarray]:
        image = read_image(medium[0])
        return np.split(image, self.tiles(image.shape[:2]))


def store_of(source: Source, *, skip: bool = False, tiles: bool = False, **changes) -> TokenStore:
    """The source tokenised byte by byte, kept beside it."""
    return token_store(*tokenised_with(source, tiles=tiles, **changes), source, skip=skip)


def tokenised_with(source: Source | None, *, tiles: bool = False, **changes) -> tuple[DataConfig, RecipeProcessor]:
    """
    Args:
      tiles: pictures are `Tiled`.
    """
    cache = getattr(source, "_index_file", Path()).parent
    data = DataConfig(
        source=JsonLinesConfig(train="", eval=""), image_size=8, rows=1, tokens=400, images=4, frames=2, cache_dir=str(cache)
    )
    data = dataclasses.replace(data, **changes | {"visual_tokens": 2 * tiles})
    processor = RecipeProcessor(byte_tokenizer(), data)
    if tiles:
        processor.spread = dataclasses.replace(processor.spread, media=Tiled(8, "stretch", 2))
    return data, processor


def text_of(store: TokenStore, index: int) -> str:
    return byte_tokenizer().decode(store.written(index).tokens)


def processor_of(data: DataConfig, source: Source) -> RecipeProcessor:
    """Its tokenizer is trained on the source's texts."""
    conversations = (turns for index in range(len(source)) for turns in source[index].conversations)
    texts = [text for turns in conversations for text in texts_of(turns, data)]
    return RecipeProcessor(train_tokenizer(texts, data.vocab_size), data)


def parts(data: DataConfig) -> tuple[RecipeProcessor, Source]:
    source = build_source(data, "train")
    return processor_of(data, source), source


def opened(path: Path, image_root="") -> JsonLinesSource:
    return JsonLinesSource(path, image_root, cache_dir=path.parent / "cache")


def chat(*values, **more) -> dict:
    turns = [{"from": ("human", "gpt")[index % 2], "value": value} for index, value in enumerate(values)]
    return {"id": "1", "conversations": turns} | more


class WatchedSource:
    """A source that notes what is read of it, and may be interrupted or held up; it pickles."""

    def __init__(self, wrapped: Source, stop_at: int = -1, stopped=None, *, begun=None, go_on=None) -> None:
        """
        Args:
          stop_at: the example at which `stopped` is called and Ctrl-C pressed.
          begun, go_on: events; the first is set, the second waited for.
        """
        self.wrapped, self.fingerprint = wrapped, wrapped.fingerprint
        self.stop_at, self.stopped, self.begun, self.go_on = stop_at, stopped, begun, go_on
        self.read: list[int] = []
        self._index_file = wrapped._index_file  # beside which its store is kept

    def __len__(self) -> int:
        return len(self.wrapped)

    def __getitem__(self, index: int) -> Example:
        self.read.append(index)
        if index == self.stop_at:
            if self.stopped is not None:
                self.stopped()
            raise KeyboardInterrupt
        if self.begun is not None:
            self.begun.set()
            assert self.go_on.wait(60)
        return self.wrapped[index]


def build_and_wait(source: WatchedSource, settings: dict, cache: str) -> None:
    """What another process does."""
    store_of(source, **settings, cache_dir=cache)
    assert source.read == list(range(len(source)))
