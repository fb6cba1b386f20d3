"""Text <-> token ids: a byte-level BPE trained on the spot, or any published fast tokenizer.

Five special tokens have a place in every model of this library; their names are Flamingo's. A published tokenizer's own
padding, begin and end tokens are kept; what it lacks is added.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from vlm_jax.errors import first_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

PAD, BOS, EOS, IMAGE, EOC = SPECIAL = ("<pad>", "<BOS>", "<EOS>", "<image>", "<EOC>")


class TokenizerError(ValueError):
    """A tokenizer that cannot be had or used."""


def check_known(ids: np.ndarray, vocabulary: int | None) -> None:
    """
    Args:
      vocabulary: how many tokens the model knows; None: it is not said.

    Raises:
      TokenizerError: one that the model has no embedding of.
    """
    if vocabulary is not None and ids.size and (most := int(ids.max())) >= vocabulary:
        raise TokenizerError(
            f"the tokenizer gives the token {most}, and the model knows those below {vocabulary}: the tokenizer is another "
            "model's, or a token in tokenizer_config.json is not one of the vocabulary"
        )


class Tokenizer:
    """A fast tokenizer, and the ids of the five special tokens.

    Attributes:
      pad_id, bos_id, eos_id, image_id, eoc_id: `<image>` stands where a picture does, `<EOC>` ends a learned text.
      vocab_size: one more than the greatest id.
    """

    def __init__(self, backend: PreTrainedTokenizerFast, end: str = EOC):
        """
        Args:
          end: the token that is `<EOC>`; a published model's own end token does as well.
        """
        self._wrapped, self._end = backend, end
        added = {}
        if backend.pad_token is None:
            added["pad_token"] = PAD
        if backend.bos_token is None:
            added["bos_token"] = BOS
        if backend.eos_token is None:
            added["eos_token"] = EOS
        vocab = backend.get_vocab()
        missing = [token for token in (IMAGE, end) if token not in vocab]
        if added:
            backend.add_special_tokens(added)
        if missing:
            backend.add_tokens(missing, special_tokens=True)
        self.pad_id: int = backend.pad_token_id
        self.bos_id: int = backend.bos_token_id
        self.eos_id: int = backend.eos_token_id
        self.image_id: int = backend.convert_tokens_to_ids(IMAGE)
        self.eoc_id: int = backend.convert_tokens_to_ids(end)
        self.vocab_size: int = max(backend.get_vocab().values()) + 1
        self._fast = backend.backend_tokenizer
        self._fast.encode_special_tokens = True  # as text, that is

    def encode(self, text: str) -> list[int]:
        """Token ids; nothing is added in front or behind. "<image>" and the like, written out, are text."""
        return self._fast.encode(text, add_special_tokens=False).ids

    def encode_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """`encode`, and the characters (begin, end) that each token stands for."""
        encoding = self._fast.encode(text, add_special_tokens=False)
        return encoding.ids, encoding.offsets

    @property
    def serialised(self) -> str:
        """Two tokenizers with the same string encode every text the same way."""
        return f"{self._end}\0{self._fast.to_str()}"

    def decode(self, ids: Iterable[int], special: bool = True) -> str:
        """Text of the ids.

        Args:
          special: whether special tokens are written out, or left away.
        """
        ids = [int(i) for i in ids]
        return self._wrapped.decode(ids, skip_special_tokens=not special, clean_up_tokenization_spaces=False)

    def save(self, folder: str | Path) -> None:
        """Writes the folder that `load_tokenizer` and transformers' `AutoTokenizer` read.

        Each file appears whole, `tokenizer.json` last: several processes may do so at once, and be interrupted.
        """
        save_tokenizer(self._wrapped, Path(folder))

    @property
    def hf_tokenizer(self) -> PreTrainedTokenizerFast:
        """transformers' own."""
        return self._wrapped

    def __reduce__(self):
        return (Tokenizer, (self._wrapped, self._end))


def save_tokenizer(hf_tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """See `Tokenizer.save`."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".saving-", dir=folder) as made:
        hf_tokenizer.save_pretrained(made)
        for file in sorted(Path(made).iterdir(), key=lambda path: path.name == "tokenizer.json"):
            file.replace(folder / file.name)


def load_fast(name: str | Path) -> PreTrainedTokenizerFast:
    """transformers' tokenizer of a folder or a hub repository that has a `tokenizer.json`, as it is there.

    Raises:
      TokenizerError: there is none, or it cannot be read.
    """
    # AutoTokenizer would import torch.
    from transformers import PreTrainedTokenizerFast

    path = Path(name).expanduser()
    where = str(path) if path.exists() else str(name)
    if path.is_dir() and not (path / "tokenizer.json").is_file():
        raise TokenizerError(f"tokenizer {where}: no tokenizer.json in this folder; only fast tokenizers can be read")
    try:
        return PreTrainedTokenizerFast.from_pretrained(where)
    except Exception as error:  # the hub client, the JSON reader and the Rust parser each have their own
        cause = first_line(error)
        raise TokenizerError(f"tokenizer {where!r}: neither a folder nor a hub repository that can be read: {cause}") from error


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE (Sennrich et al. 2016; Radford et al. 2019): any text can be written with it, nothing is unknown.

    The same texts give the same tokenizer, whatever the machine.

    Args:
      vocab_size: at most so many tokens, the 256 bytes and five special ones among them.

    Raises:
      TokenizerError: `vocab_size` leaves no room for the bytes and the special tokens.
    """
    from tokenizers import Tokenizer as Fast
    from tokenizers import decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    least = len(alphabet) + len(SPECIAL)
    if vocab_size < least:
        raise TokenizerError(f"data.vocab_size={vocab_size}: a byte-level tokenizer needs at least {least}")
    fast = Fast(models.BPE())
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=list(SPECIAL), initial_alphabet=alphabet, show_progress=False
    )
    fast.train_from_iterator(texts, trainer)
    return Tokenizer(
        PreTrainedTokenizerFast(
            tokenizer_object=fast, pad_token=PAD, bos_token=BOS, eos_token=EOS, additional_special_tokens=[IMAGE, EOC]
        )
    )


def load_tokenizer(name: str | Path, end: str = EOC) -> Tokenizer:
    """`load_fast`, with the tokens that it lacks added.

    Args:
      end: see `Tokenizer`.

    Raises:
      TokenizerError: there is none, or it cannot be read.
    """
    try:
        return Tokenizer(load_fast(name), end)
    except TokenizerError:
        raise
    except Exception as error:  # tokens that the Rust library refuses
        raise TokenizerError(f"tokenizer {str(name)!r} cannot be used: {first_line(error)}") from error
