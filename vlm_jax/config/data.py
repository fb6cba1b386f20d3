"""Data sets and batches."""

from __future__ import annotations

from typing import Literal

from vlm_jax.config.frozen import frozen


@frozen
class EasyVqaConfig:
    kind: Literal["easy_vqa"] = "easy_vqa"
    cache_dir: str = "~/.cache/vlm_jax/tfds"  # where tensorflow-datasets keeps the prepared set


@frozen
class JsonLinesConfig:
    """The user's own data: see `vlm_jax/data/jsonl.py` for the two formats of a line."""

    kind: Literal["jsonl"] = "jsonl"
    train: str
    eval: str
    image_root: str = ""  # "": pictures are looked for beside the JSON-lines file
    bad_lines: Literal["error", "skip"] = "error"  # skip: counted and reported


@frozen
class AugmentConfig:
    flip: bool = False  # left-right and up-down, each with probability 1/2
    shift: int = 0  # up to so many pixels each way; the border is repeated
    colour: float = 0.0  # brightness and contrast by up to this share


@frozen
class SampleRule:
    """How often a kind of sequence is trained on.

    The first rule whose `pattern` (a regex, searched in the sequence's text) matches counts.
    """

    pattern: str
    share: float  # above 0, at most 1: the chance of a matching sequence to be in an epoch


@frozen
class DataConfig:
    source: EasyVqaConfig | JsonLinesConfig
    tokenizer: str  # "train": a byte-level BPE made from the training text; else a folder or a hub name
    vocab_size: int = 512  # of a trained tokenizer, at most
    end: str = "<EOC>"  # the token that closes a learned text; a published model's own is its end token, as "</s>"
    prompt: str = "Question: {question} Answer:"  # one turn as the model reads it
    answer: str = " {answer}"
    image_size: int
    image_fit: Literal["stretch", "pad", "crop"] = "pad"
    sequences_per_image: int = 0  # at most so many questions share one packed picture, 0: all of an example's
    rows: int  # B, over the whole mesh
    tokens: int  # T of a row
    images: int  # M of a row
    frames: int = 1  # F of a slot
    # How many `<image>` tokens a picture is: 0 where it is read by cross-attention, one then says where it stands; else as many
    # as it has visual tokens, which take their places (LLaVA).
    visual_tokens: int = 0
    sampling: tuple[SampleRule, ...] = ()  # of training; an evaluation takes every sequence
    augment: AugmentConfig = AugmentConfig()
    blank_images: bool = False  # the control experiment: every picture grey
    workers: int = 1  # processes that prepare batches ahead; 0: in the training process

    @property
    def picture_tokens(self) -> int:
        """How many `<image>` stand in the text for a picture."""
        return max(1, self.visual_tokens)
