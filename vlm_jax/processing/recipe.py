"""The recipes of this repository: Flamingo's layout (Alayrac et al. 2022, section 3.1) around a prompt and an answer string.

`<BOS>`, then text, with an `<image>` token at each picture's place. `<EOC>`, "end of chunk", closes each learned text and the
sequence; it is learned with the text it closes, because saying it is how a model stops::

    <BOS>  <image>  Q  ?  red  <EOC>  <image>  Q  ?  no  <EOC>

Where visual tokens stand in the sequence itself (LLaVA), a picture is as many `<image>` as it has visual tokens.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from vlm_jax.config import DataConfig
from vlm_jax.errors import DataError, RequestError
from vlm_jax.processing.conversation import Conversation, Medium, Text, Turn
from vlm_jax.processing.layout import LEARNED, PROMPT, TokenizedConversation
from vlm_jax.processing.media import FittedMedia
from vlm_jax.processing.processor import Processor, Spread
from vlm_jax.processing.spans import CONTEXT, tokenize_continuation
from vlm_jax.processing.tokenizer import Tokenizer

KNOWN_TEXTS = 2048  # whose tokens are remembered


class RecipeProcessor(Processor):
    def __init__(self, tokenizer: Tokenizer, data: DataConfig) -> None:
        self.tokenizer, self.data = tokenizer, data
        media = FittedMedia(data.image_size, fit=data.image_fit, tile_tokens=data.visual_tokens, blank=data.blank_images)
        self.spread = Spread(media, tokenizer.image_id, tokenizer.eoc_id)
        self.pad_id = tokenizer.pad_id
        self.blind = data.blank_images
        # A tokenizer may have no <EOC> apart from <EOS>, or use <EOS> as <BOS> or padding: an end is always allowed.
        self.ends = {tokenizer.eoc_id, tokenizer.eos_id}
        # Questions and answers of a data set are often the same.
        self._encode = functools.lru_cache(KNOWN_TEXTS)(tokenizer.encode_offsets)
        self._continued = functools.lru_cache(KNOWN_TEXTS)(functools.partial(tokenize_continuation, tokenizer.encode_offsets))

    def __reduce__(self) -> Any:
        return type(self), (self.tokenizer, self.data)

    def write(self, conversation: Conversation, *, open: bool = False) -> TokenizedConversation:
        tokenizer = self.tokenizer
        tokens, flags = [tokenizer.bos_id], [PROMPT]
        learning, run = False, ""  # run: the text since the last special token

        def add(ids: list[int], flag: int) -> None:
            tokens.extend(ids)
            flags.extend([flag] * len(ids))

        def end_chunk(*, force: bool = False) -> None:
            nonlocal run
            if learning or force:
                add([tokenizer.eoc_id], LEARNED if learning else PROMPT)
                run = ""

        for part, learn in joined(learned_pieces(conversation, self.data)):
            if isinstance(part, Medium) or not learn:
                end_chunk()
                learning = False
            if isinstance(part, Medium):
                add([tokenizer.image_id], PROMPT)
                run = ""
            elif learn:
                learning = True
                add(self._continued(run[-CONTEXT:], part), LEARNED)
                run += part
            else:
                add(self._encode(part)[0], PROMPT)
                run += part
        if not open:
            end_chunk(force=True)
        return TokenizedConversation(np.asarray(tokens, np.int32), np.asarray(flags, np.uint8))

    def allowed(self, vocabulary: int) -> np.ndarray:
        tokenizer = self.tokenizer
        # The embedding may have more rows than the tokenizer has tokens.
        allowed = np.arange(vocabulary) < tokenizer.vocab_size
        allowed[sorted({tokenizer.image_id, tokenizer.pad_id, tokenizer.bos_id} - self.ends)] = False
        return allowed

    def fingerprint_parts(self) -> list[Any]:
        changed = [value for value in (self.data.learned, self.data.leading_space) if value not in ("all", 0.0)]
        return [self.tokenizer.serialised, self.data.prompt, self.data.answer, *changed]


Piece = tuple[Medium | str, bool]  # and whether it is learned


def rendered(conversation: Conversation, data: DataConfig) -> list[Piece]:
    """The conversation in the recipe's words: a user's turn in `data.prompt`, an assistant's in `data.answer`.

    A user's only picture stands before the question; so do pictures at the turn's beginning. Others stay within it.

    Raises:
      DataError: a prompt or answer string without its field.
    """
    pieces: list[Piece] = []
    before, after = _around("answer", data.answer)
    for turn in conversation:
        if turn.role == "user":
            pieces += [(piece, False) for piece in _question(turn, data.prompt)]
        elif turn.role == "assistant":
            if any(isinstance(part, Medium) for part in turn.content):
                raise RequestError("an assistant's turn has a picture; pictures belong to the user's turns")
            text = turn.text.rstrip() if data.leading_space else turn.text.strip()
            pieces.append((before + text + after, turn.learn))
        else:
            pieces += [(part.text if isinstance(part, Text) else part, turn.learn) for part in turn.content]
    return pieces


def learned_pieces(conversation: Conversation, data: DataConfig) -> list[Piece]:
    """`rendered`, with what `data.learned` leaves out read only.

    With "after_image" nothing is learned before the first picture, nor between the end of a chunk and the next picture:
    OpenFlamingo's mask for MMC4 (`open_flamingo/train/train_utils.py`)::

        Intro.  <image>  One.  <EOC>  Between.  <image>  Two.  <EOC>
                         ----  -----                     ----  -----
    """
    pieces = rendered(conversation, data)
    if data.learned == "all":
        return pieces
    out: list[Piece] = []
    in_chunk = learning = False
    for part, learn in pieces:
        if isinstance(part, Medium):
            in_chunk, learning = True, False
        elif learn and in_chunk:
            learning = True
        elif learning:  # a text that is only read ends the chunk
            in_chunk = learning = False
        out.append((part, learn and in_chunk))
    return out


def _around(name: str, template: str) -> tuple[str, str]:
    field = {"prompt": "{question}", "answer": "{answer}"}[name]
    if template.count(field) != 1:
        raise DataError(f"data.{name}={template!r}: expected {field} in it, once")
    before, _, after = template.partition(field)
    return before, after


def _question(turn: Turn, prompt: str) -> list[Medium | str]:
    media = [part for part in turn.content if isinstance(part, Medium)]
    content = [*media, Text(turn.text)] if len(media) == 1 else list(turn.content)
    leading = next((place for place, part in enumerate(content) if isinstance(part, Text)), len(content))
    before, after = _around("prompt", prompt)
    within: list[Medium | str] = [part.text if isinstance(part, Text) else part for part in content[leading:]]
    if within and isinstance(within[0], str):
        within[0] = within[0].lstrip()
    if within and isinstance(within[-1], str):
        within[-1] = within[-1].rstrip()
    return [*content[:leading], before, *within, after]


def joined(pieces: list[Piece]) -> list[Piece]:
    """Neighbouring texts that are both read, or a text and an empty one, as one: they are tokenised together."""
    out: list[Piece] = []
    for piece, learn in pieces:
        if isinstance(piece, str) and not learn:
            if out and isinstance(out[-1][0], str) and not out[-1][1]:
                out[-1] = (out[-1][0] + piece, False)
            elif piece:
                out.append((piece, False))
        else:
            out.append((piece, learn))
    return out


def texts_of(conversation: Conversation, data: DataConfig) -> list[str]:
    """The texts that a tokenizer is trained on."""
    return [piece for piece, _ in joined(rendered(conversation, data)) if isinstance(piece, str)]
