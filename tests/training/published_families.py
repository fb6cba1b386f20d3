"""Tiny published checkpoints to train from: as PyTorch models that read text and files, and as runs of `configs/finetune.py`.

family = FAMILIES["llava"]
model, processor = family.made(folder)
inputs = family.prompt(processor, messages[:-1])
logits = family.logits(model, inputs, answer)
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import references
import torch
import transformers
from conversations import Message, random_conversation
from folders import picture
from openflamingo_reference import open_clip_pixels
from references import END, opened, strings, upright
from test_openflamingo import SIDE, neox
from test_openflamingo import made as openflamingo_made
from torch_helpers import randomised

import vlm_jax
from configs import finetune
from vlm_jax.batch import Batch
from vlm_jax.config import JsonLinesConfig, RunConfig
from vlm_jax.config_dict import from_config_dict
from vlm_jax.data.pipeline import TrainBatches, build_source, eval_batches
from vlm_jax.training.loop import train
from vlm_jax.training.processors import build_processor

STEPS = 60  # of `tuned`
ANSWERS = ("red", "two dogs run in the park.")

Inputs = dict[str, Any]  # of a PyTorch model, `input_ids` [1, T] and its pictures


@dataclasses.dataclass(frozen=True)
class Family:
    """
    Attributes:
      made: (folder, seed) -> PyTorch's model with random weights, and its processor; both are saved in the folder.
      prompt: (processor, messages up to an answer) -> the model's inputs, made by transformers.
      extended: (inputs, so many tokens behind the prompt) -> the inputs that are not tokens.
      ends: tokens that end an answer; the last of them stands behind answers.
      said: what `random_conversation` must keep to.
      sizes: changes of the run's `DataConfig`; fusion: of its `ModelConfig.fusion`.
    """

    made: Callable[..., tuple[torch.nn.Module, Any]]
    prompt: Callable[[Any, Sequence[Message]], Inputs]
    extended: Callable[[Inputs, int], Inputs] = lambda inputs, more: {}
    ends: tuple[str, ...] = ("</s>",)
    said: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    sizes: Mapping[str, Any] = dataclasses.field(default_factory=lambda: dict(rows=4, tokens=512, images=8))
    fusion: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def logits(self, model: torch.nn.Module, inputs: Inputs, answer: Sequence[int]) -> torch.Tensor:
        """[T, V] of a prompt and an answer behind it."""
        ids = torch.cat([inputs["input_ids"], torch.tensor([list(answer)], dtype=torch.long)], dim=1)
        pictures = {name: value for name, value in inputs.items() if "pixel" in name or "image" in name}
        return model(input_ids=ids, **{"attention_mask": torch.ones_like(ids)} | pictures | self.extended(inputs, len(answer)))[
            "logits"
        ][0]


def saved(name: str, style: str, ends: Sequence[str] = ("</s>",)) -> Callable[..., tuple[torch.nn.Module, Any]]:
    """A family of `references.py`, its weights made random.

    Args:
      ends: what its `generation_config.json` says.
    """

    def make(folder: Path, seed: int = 0) -> tuple[torch.nn.Module, Any]:
        processor = references.FAMILIES[name].make(folder, style)
        model = randomised(loaded(folder), seed)
        model.generation_config.eos_token_id = processor.tokenizer.convert_tokens_to_ids(list(ends))
        model.save_pretrained(folder)
        return model, processor

    return make


def loaded(folder: Path) -> torch.nn.Module:
    """The model in a folder, which must hold all its weights and no other."""
    kind = getattr(transformers, json.loads((folder / "config.json").read_text())["architectures"][0])
    model, info = kind.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    return model.eval()


def chat(processor: Any, messages: Sequence[Message]) -> Inputs:
    return _templated(processor, messages, upright(messages) or None)


def idefics2(processor: Any, messages: Sequence[Message]) -> Inputs:
    pictures = opened(messages)
    return _templated(processor, messages, [pictures] if pictures else None)


def _templated(processor: Any, messages: Sequence[Message], pictures: Any) -> Inputs:
    text = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    begun = text.startswith(processor.tokenizer.bos_token)
    return processor(images=pictures, text=[text], return_tensors="pt", add_special_tokens=not begun)


def idefics(processor: Any, messages: Sequence[Message]) -> Inputs:
    """Their list of texts and pictures is "Q1 A1\\nQ2", cut at the pictures."""
    pictures = iter(upright(messages))
    prompt: list[Any] = []
    for message in messages:
        parts = [next(pictures) if part["type"] == "image" else part["text"] for part in message["content"]]
        for part in [" ", *parts, "\n"] if message["role"] == "assistant" else parts:
            if isinstance(part, str) and prompt and isinstance(prompt[-1], str):
                prompt[-1] += part
            elif part != "":
                prompt.append(part)
    return processor(text=[prompt])


def idefics_extended(inputs: Inputs, more: int) -> Inputs:
    """What follows sees what the last token of the prompt sees, as in their `generate`."""
    mask = inputs["image_attention_mask"]
    return dict(image_attention_mask=torch.cat([mask, mask[:, -1:].expand(-1, more, -1)], dim=1))


def paligemma(processor: Any, messages: Sequence[Message]) -> Inputs:
    pictures = upright(messages)
    text = "<image>" * len(pictures) + "\n".join(message["content"] for message in strings(messages))
    inputs = processor(images=pictures, text=text, return_tensors="pt")
    return {name: value for name, value in inputs.items() if name != "labels"}


def paligemma_extended(inputs: Inputs, more: int) -> Inputs:
    return dict(token_type_ids=torch.tensor([[0] * inputs["input_ids"].shape[1] + [1] * more]))


@dataclasses.dataclass(frozen=True)
class OpenFlamingoProcessor:
    """What `open_flamingo.create_model_and_transforms` gives beside the model."""

    tokenizer: Any
    image_processor: Callable[[Any], torch.Tensor]


class OpenFlamingo(torch.nn.Module):
    """The reference with the arguments and results of transformers' models."""

    def __init__(self, reference: torch.nn.Module) -> None:
        super().__init__()
        self.reference = reference

    def forward(self, input_ids: torch.Tensor, pixel_values: torch.Tensor, **_: Any) -> Inputs:
        return dict(logits=self.reference(input_ids, pixel_values))


def openflamingo(only_last: bool) -> Callable[..., tuple[torch.nn.Module, Any]]:
    def make(folder: Path, seed: int = 0) -> tuple[torch.nn.Module, Any]:
        reference, words, _ = openflamingo_made(folder, neox, 2, only_last)
        return OpenFlamingo(reference), OpenFlamingoProcessor(words, lambda picture: open_clip_pixels(picture, SIDE))

    return make


def openflamingo_prompt(processor: OpenFlamingoProcessor, messages: Sequence[Message]) -> Inputs:
    text = ""
    for message in messages:
        said = "".join("<image>" if part["type"] == "image" else part["text"] for part in message["content"])
        text += f" {said}<|endofchunk|>" if message["role"] == "assistant" else said
    pictures = upright(messages)
    blank = torch.zeros(3, SIDE, SIDE)  # which no token sees
    made = torch.stack([processor.image_processor(picture) for picture in pictures] or [blank])
    return dict(input_ids=processor.tokenizer(text, return_tensors="pt")["input_ids"], pixel_values=made[None])


LARGE = dict(rows=4, tokens=768, images=30)
BOTH = ("</s>", END)  # as published with IDEFICS2, whose template writes the other one
FAMILIES = {
    "llava": Family(saved("llava", "prepend"), chat, said=dict(system=True)),
    "llava_next": Family(saved("llava_next", "prepend"), chat, said=dict(system=True), sizes=LARGE),
    "idefics": Family(saved("idefics", "prepend"), idefics, idefics_extended),
    "idefics2": Family(saved("idefics2", "prepend", BOTH), idefics2, ends=BOTH, said=dict(system=True)),
    "idefics2_split": Family(
        saved("idefics2_split", "bytes", BOTH), idefics2, ends=BOTH, said=dict(system=True, least_side=2), sizes=LARGE
    ),
    "paligemma": Family(
        saved("paligemma", "metaspace_first"),
        paligemma,
        paligemma_extended,
        said=dict(turns=1, least_pictures=1, most_pictures=2),
    ),
    "openflamingo": Family(openflamingo(only_last=True), openflamingo_prompt, ends=("<|endofchunk|>",)),
    "openflamingo_all_previous": Family(
        openflamingo(only_last=False),
        openflamingo_prompt,
        ends=("<|endofchunk|>",),
        said=dict(least_pictures=1),
        fusion=dict(media="all_previous_uniform"),
    ),
}


def write_conversations(folder: Path, many: Sequence[Sequence[Message]]) -> Path:
    """A JSON-lines file; the pictures of conversation n are the files n_0, n_1, ... in its folder."""
    lines = []
    for number, messages in enumerate(many):
        count, new = 0, []
        for message in messages:
            parts = []
            for part in message["content"]:
                if part["type"] == "image":
                    part = part | dict(image=next(folder.glob(f"{number}_{count}.*")).name)
                    count += 1
                parts.append(part)
            new.append(message | dict(content=parts))
        lines.append(json.dumps(dict(id=str(number), messages=new)))
    path = folder / "data.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return path


def conversations(folder: Path, said: Mapping[str, Any], count: int = 8) -> list[list[Message]]:
    """Of up to three pictures each, as messages; their files are in the folder. The first question of each is its own."""
    settings = dict(most_pictures=3) | said
    system = settings.pop("system", False)
    many = [random_conversation(seed, folder, system=system and seed % 3 == 0, **settings) for seed in range(count)]
    for number, messages in enumerate(many):
        first = next(message for message in messages if message["role"] == "user")
        first["content"] = [*first["content"], dict(type="text", text=f" ({number})")]
    return many


def run_config(
    checkpoint: Path, lines: Path, sizes: Mapping[str, Any], *, fusion: Mapping[str, Any] | None = None, **changes: Any
) -> RunConfig:
    """What `train.py --config=configs/finetune.py:CHECKPOINT` is given.

    Args:
      lines: the JSON-lines file; sizes: changes of its `DataConfig`; fusion: of its `ModelConfig.fusion`.
    """
    run = from_config_dict(RunConfig, finetune.get_config(str(checkpoint)))
    source = JsonLinesConfig(train=str(lines), eval=str(lines))
    data = dataclasses.replace(run.data, source=source, workers=0, **sizes)
    if fusion:
        changes["model"] = dataclasses.replace(run.model, fusion=dataclasses.replace(run.model.fusion, **fusion))
    return dataclasses.replace(run, data=data, **dict(dtype="float32", remat="none", pickles=True) | changes)


def packed(run: RunConfig, folder: Path) -> tuple[list[Batch], list[Batch]]:
    """Batches of an evaluation, and those of `run.steps` steps of training."""
    source = build_source(run.data, "train")
    processor = build_processor(run.data, source, folder, pickles=run.pickles)
    with TrainBatches(run, processor, source) as batches:
        return list(eval_batches(run.data, processor, source)), list(batches)


def segments_of(batch: Batch) -> Iterator[tuple[int, np.ndarray]]:
    """(row, the places in it) of every conversation."""
    for row, segments in enumerate(batch.segments):
        for number in range(1, segments.max() + 1):
            yield row, np.flatnonzero(segments == number)


@dataclasses.dataclass(frozen=True)
class Tuned:
    """A checkpoint that learned two answers.

    Attributes:
      run, exported: folders; questions: messages of one question each, `ANSWERS` are the answers; loss: of a learned token, as
        the run's last evaluation says.
    """

    run: Path
    exported: Path
    questions: list[list[Message]]
    loss: float


def tuned(folder: Path, family: Family) -> Tuned:
    """The same question about two pictures, learned by heart: the recipe `configs/finetune.py`, `train`, `vlm_jax.export`."""
    family.made(folder / "published", 1)
    pictures = folder / "data"
    pictures.mkdir()
    questions = []
    for number, size in enumerate(((30, 18), (15, 40))):
        path = pictures / f"{number}_0.png"
        picture(number, *size).save(path)
        content = [dict(type="image", image=str(path)), dict(type="text", text="what is in the picture?")]
        questions.append([dict(role="user", content=content)])
    closed = [
        [*messages, dict(role="assistant", content=[dict(type="text", text=answer)])]
        for messages, answer in zip(questions, ANSWERS, strict=True)
    ]
    lines = write_conversations(pictures, closed)
    whole = dict.fromkeys(("steps", "eval_every", "save_every", "log_every"), STEPS)
    run = run_config(folder / "published", lines, dict(rows=1, tokens=320, images=12), **whole)
    optimizer = dataclasses.replace(run.optimizer, lr=5e-3, warmup_steps=5)
    result = train(dataclasses.replace(run, optimizer=optimizer), folder / "run")
    assert result.metrics["accuracy"] == 1 and result.metrics["sequences"] == 2, result.metrics
    vlm_jax.export(folder / "run", folder / "exported")
    return Tuned(folder / "run", folder / "exported", questions, result.metrics["loss"])
