"""Data sets and batches."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from vlm_jax.config.frozen import Kinds, frozen


@frozen
class SourceConfig(Kinds):
    """The source of the training and evaluation examples."""

    bad_lines: ClassVar[str] = "error"  # "skip": an example that is wrong is left out, counted and reported
    members: ClassVar[tuple[Any, ...]] = ()  # of a mixture


@frozen
class EasyVqaConfig(SourceConfig):
    kind: Literal["easy_vqa"] = "easy_vqa"
    cache_dir: str = "~/.cache/vlm_jax/tfds"  # where tensorflow-datasets keeps the prepared set
    conversations: bool = False  # in training, all questions about a picture are the turns of one conversation


@frozen
class EasyVqaPairsConfig(SourceConfig):
    """easy-VQA's training questions, each with the right answer and a wrong one of the same kind: `data.pairs`."""

    kind: Literal["easy_vqa_pairs"] = "easy_vqa_pairs"
    cache_dir: str = "~/.cache/vlm_jax/tfds"  # as of easy_vqa


@frozen
class StampsConfig(SourceConfig):
    """Tux Paint's stamps with their captions; a quarter of the captions is held out."""

    kind: Literal["stamps"] = "stamps"
    folder: str = "/usr/share/tuxpaint/stamps"
    held_out: tuple[str, ...] = ()  # whole categories instead: names of folders in `folder`, as ("food", "plants")


@frozen
class EpisodesConfig(SourceConfig):
    """In training, examples of another source in a row, as few-shot prompts have them; the held-out ones stay single."""

    kind: Literal["episodes"] = "episodes"
    source: SourceConfig
    examples: int = 5  # of an episode
    orders: int = 4  # how often an example stands in an episode, each time among others


@frozen
class EmojiConfig(SourceConfig):
    """Emoji of one drawing style with their names; a quarter of the names is held out."""

    kind: Literal["emoji"] = "emoji"
    folder: str  # an unpacked npm package emoji-datasource-*
    eval_folder: str = ""  # of another style, in which the held-out ones are drawn; "": the same


@frozen
class FashionMnistConfig(SourceConfig):
    """Fashion-MNIST: pictures of ten classes of clothes."""

    kind: Literal["fashion_mnist"] = "fashion_mnist"
    folder: str = "/usr/share/datasets/fashion-mnist"
    # Dark clothes on a white ground: its makers turned the grey values of the photographs around (section 2).
    photographed: bool = False


@frozen
class JsonLinesConfig(SourceConfig):
    """The user's own data: see `vlm_jax/data/sources/jsonl.py` for the formats of a line."""

    kind: Literal["jsonl"] = "jsonl"
    train: str
    eval: str
    image_root: str = ""  # "": the folder of the JSON-lines file
    bad_lines: Literal["error", "skip"] = "error"  # skip: counted and reported


@frozen
class AugmentConfig:
    flip: bool = False  # left-right and up-down, each with probability 1/2
    mirror: bool = False  # left-right alone
    shift: int = 0  # maximum shift in pixels; the border is repeated
    colour: float = 0.0  # maximum relative change of brightness and contrast


@frozen
class SampleRule:
    """Subsampling of some sequences.

    The first rule whose `pattern` (a regex, searched in the sequence's text) matches counts.
    """

    pattern: str
    share: float  # above 0, at most 1: the probability that a matching sequence is in an epoch


@frozen
class DataConfig:
    source: SourceConfig
    # What a row holds: conversations, packed; or a picture and its caption, for two towers (`processing/pair.py`).
    layout: Literal["conversation", "pair"] = "conversation"
    # A published checkpoint (folder or name) whose own tokenizer, chat template and picture processor are used; "": the
    # recipe's, which are `tokenizer`, `prompt`, `answer` and `image_fit`.
    processor: str = ""
    template: str = ""  # of a published processor: a name of `processing/templates.py`; "": its own
    pad_to_square: bool = False  # pictures for LLaVA-1.5's processor, as its authors train stage 2
    tokenizer: str = "train"  # "train": a byte-level BPE made from the training text; else a folder or a hub name
    vocab_size: int = 512  # maximum, of a trained tokenizer
    end: str = "<EOC>"  # the token after a learned text; of a published model its end token, as "</s>"
    prompt: str = "Question: {question} Answer:"  # one turn as the model reads it
    answer: str = " {answer}"
    image_size: int  # pixels: every tile is in a square of this side
    keep_shapes: bool = False  # tiles of a published processor that differ in size within that square (IDEFICS2)
    image_fit: Literal["stretch", "pad", "crop"] = "pad"
    sequences_per_image: int = 0  # maximum number of questions per packed image; 0: all of an example's
    # Whether the sequences about an image share the tokens they begin with, its visual tokens among them, in a row: the same
    # predictions for less work where an image has several questions. Not for a prefix-LM.
    share_prefix: bool = False
    rows: int  # B, over the whole mesh
    tokens: int  # T of a row
    images: int  # M of a row: pictures, or tiles where visual tokens stand in the sequence
    frames: int = 1  # F of a slot
    video_rate: float = 1.0  # frames a second that are read of a video's file, `frames` at most
    # Number of visual tokens of a tile in the sequence (LLaVA); 0: cross-attention.
    visual_tokens: int = 0
    sampling: tuple[SampleRule, ...] = ()  # only in training; an evaluation uses every sequence
    augment: AugmentConfig = AugmentConfig()
    # What is learned of a conversation: all its learned texts, or only those that follow a picture, up to the end of that chunk
    # (OpenFlamingo's label mask for interleaved documents).
    learned: Literal["all", "after_image"] = "all"
    # Flamingo's p_next: the probability, drawn once a document, that in training its tokens see the next picture by
    # cross-attention instead of the last one.
    next_image: float = 0.0
    # The probability, drawn once an example, that its learned texts begin with a space (Flamingo's paired texts).
    leading_space: float = 0.0
    blank_images: bool = False  # the control experiment: every image grey
    # Whether the features of a frozen vision encoder are computed once and kept on disk, in the place of pixels.
    cache_features: bool = False
    check_pictures: bool = False  # decode every picture before the first step, once, and not only its header
    # Every example is pairs of a chosen and a rejected answer to the same question about the same pictures (objective
    # "preference"); both halves of a pair are always in the same row.
    pairs: bool = False
    # A conversation that is longer, or has more pictures, than a row takes: an error; its last turns are dropped until it fits;
    # or it is truncated where the row ends, as pages are for Flamingo, and captions for CLIP and SigLIP. All are counted and
    # reported. A pair of answers is dropped as a whole.
    too_long: Literal["error", "drop_turns", "truncate"] = "error"
    cache_dir: str = "~/.cache/vlm_jax/tokens"  # where tokenised data sets are kept
    workers: int = 1  # processes that prepare batches ahead; 0: in the training process
