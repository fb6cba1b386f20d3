"""Published checkpoints' own processing: transformers' tokenizer, chat template and picture processor, without PyTorch.

Pictures leave it as bytes: rescaling and normalising are left to the vision encoder, which has the mean and the deviation.

Axis letter: C compact tokens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Set as AbstractSet
from typing import Any

import numpy as np

from vlm_jax.config.generation import Settings
from vlm_jax.errors import RequestError
from vlm_jax.processing.conversation import Conversation, Text, Turn, media_of
from vlm_jax.processing.layout import TokenizedConversation
from vlm_jax.processing.media import FittedMedia, MediaProcessor
from vlm_jax.processing.processor import LANGUAGE_ONLY, Processor, Spread
from vlm_jax.processing.spans import Marks, Span, append_answer, flag_tokens, tokenize_continuation
from vlm_jax.processing.templates import TEMPLATES, render
from vlm_jax.processing.tokenizer import TokenizerError, check_known

NAMED = frozenset(TEMPLATES.values())


class PublishedTokenizer:
    """transformers' tokenizer as processors and the generator use it."""

    def __init__(self, hf_tokenizer: Any) -> None:
        self.hf_tokenizer = hf_tokenizer
        self.vocab_size = max(hf_tokenizer.get_vocab().values()) + 1

    @property
    def begin(self) -> str:
        """The token that prompts begin with.

        Raises:
          TokenizerError: there is none.
        """
        if (token := self.hf_tokenizer.bos_token) is None:
            raise TokenizerError("the tokenizer has no bos_token, with which this model's prompts begin: fetch it again")
        return token

    def encode(self, text: str) -> list[int]:
        return self.hf_tokenizer.encode(text, add_special_tokens=False)

    def decode(self, ids: list[int], special: bool = True) -> str:
        return self.hf_tokenizer.decode(ids, skip_special_tokens=not special)

    def encode_offsets(self, text: str, *, begin: bool = False) -> tuple[list[int], list[Span]]:
        """Ids, and the characters each stands for.

        Args:
          begin: with the tokens that the tokenizer puts in front of a text.
        """
        made = self.hf_tokenizer(text, add_special_tokens=begin, return_offsets_mapping=True)
        return made["input_ids"], made["offset_mapping"]


class PublishedProcessor(Processor):
    """Processor of a published checkpoint: text by its chat template; visual tokens replace each `<image>`.

    A base model has no template: it reads the prompt unchanged, then `before_answer`, the answer and `after_answer`. A learned
    text outside of a chat is followed by `after_text`.

    Attributes:
      hf_processor: transformers' processor, or its tokenizer alone for a language model.
      template: Jinja; "": a base model.
    """

    before_answer, after_answer, after_text = " ", "\n", ""
    resets_at: int | None = None
    vocabulary: int | None = None  # how many tokens the model knows; None: it is not said

    def __init__(
        self,
        hf_processor: Any,
        ends: AbstractSet[int],
        defaults: Settings,
        *,
        media: MediaProcessor | None = None,
        image_token: str = "",
    ) -> None:
        """
        Args:
          media: None: a language model alone.
          image_token: the text that stands for a picture.
        """
        self.hf_processor, self.ends, self.defaults, self.image_token = hf_processor, set(ends), defaults, image_token
        tokenizer = getattr(hf_processor, "tokenizer", hf_processor)
        self.tokenizer = PublishedTokenizer(tokenizer)
        self.pad_id = next((i for i in (tokenizer.pad_token_id, *sorted(ends)) if i is not None), 0)
        own = tokenizer.eos_token_id
        end_id = own if own in ends or not ends else min(ends)
        image_id = tokenizer.convert_tokens_to_ids(image_token) if media else -1
        self.spread = Spread(media or FittedMedia(side=1, fit="stretch", tile_tokens=0), image_id, end_id, self.resets_at)
        found = getattr(hf_processor, "chat_template", None)
        self.template: str = (found.get("default", "") if isinstance(found, dict) else found) or ""

    def limit_to(self, vocabulary: int) -> None:
        """Says how many tokens the model knows: what a damaged tokenizer makes beyond them is refused.

        Raises:
          TokenizerError: the model could never say one of the end tokens.
        """
        check_known(np.asarray(sorted(self.ends)), vocabulary)
        self.vocabulary = vocabulary
        self.pad_id = self.pad_id if self.pad_id < vocabulary else 0  # it is never seen, but has an embedding

    @property
    def has_vision(self) -> bool:
        """False for a language model alone."""
        return bool(self.image_token)

    def write(self, conversation: Conversation, *, open: bool = False) -> TokenizedConversation:
        self._check(conversation)
        last = conversation[-1] if conversation and not open and conversation[-1].learn else None
        prompt = self.rendered(conversation[:-1] if last else conversation, ask=open or last is not None)
        answers, said, end_id = self._answers(conversation, prompt, last=last)
        ids, offsets = self.tokenizer.encode_offsets(prompt, begin=self._begins(conversation, prompt))
        written = flag_tokens(prompt, ids, offsets, answers=answers, ends=self.ends)
        self._check_pictures(written, prompt, conversation)
        self._check_said(prompt, conversation[:-1] if last else conversation)
        if last is not None:
            continued = tokenize_continuation(self.tokenizer.encode_offsets, prompt, said) if last.text else []
            written = append_answer(written, continued, end_id)
        # A token that visual tokens take the place of is not read.
        replaced = self.spread.media.tile_tokens and written.tokens == self.spread.image_id
        check_known(np.where(replaced, 0, written.tokens), self.vocabulary)
        return written

    def rendered(self, turns: Conversation, *, ask: bool) -> str:
        """The text that is tokenised, as transformers' processor makes it; one image token for each run of visual tokens.

        Args:
          ask: whether the assistant is to speak next.
        """
        if self._templated(turns):
            special = self.tokenizer.hf_tokenizer.special_tokens_map
            text = render(self.template, [self._message(turn) for turn in turns], ask=ask, special=special)
        else:
            text = self.render_without_template(turns)
        return self.postprocess_prompt(text)

    def render_without_template(self, turns: Conversation) -> str:
        """The prompt of a base model."""
        text = ""
        for number, turn in enumerate(turns):
            said = "".join(part.text if isinstance(part, Text) else self.image_token for part in turn.content)
            if turn.role == "assistant":
                text += self.before_answer + said + (self.after_answer if number + 1 < len(turns) else "")
            else:
                text += said + (self.after_text if turn.learn and number + 1 < len(turns) else "")
        return text

    def postprocess_prompt(self, text: str) -> str:
        """The changes that transformers' processor of this family makes to the text before it is tokenised."""
        return text

    def _templated(self, turns: Conversation) -> bool:
        return bool(self.template and turns) and not any(turn.role == "text" for turn in turns)

    def _begins(self, turns: Conversation, text: str) -> bool:
        """Whether the tokenizer adds its begin token, as in transformers: a chat template writes its own."""
        begin = self.tokenizer.hf_tokenizer.bos_token
        return not (begin and text.startswith(begin)) and (self.has_vision or not self._templated(turns))

    def fingerprint_parts(self) -> list[Any]:
        tokenizer = self.tokenizer.hf_tokenizer
        return [
            tokenizer.backend_tokenizer.to_str(),
            tokenizer.special_tokens_map,
            self.template,
            self.image_token,
            self.before_answer,
            self.after_answer,
            self.after_text,
        ]

    def _answers(self, conversation: Conversation, prompt: str, *, last: Turn | None) -> tuple[list[Span], str, int]:
        """The spans of the answers within the prompt, what the model says behind it, and the token it ends with.

        Args:
          last: the answer behind the prompt; None: the prompt is open.

        Raises:
          RequestError: the template changes what the assistant says.
        """
        answered = [number for number, turn in enumerate(conversation) if turn.learn]
        if not answered:
            return [], "", self.spread.end_id
        before = prompt if last else self.rendered(conversation[: answered[-1]], ask=True)
        for changed in (lambda text: text, str.strip):  # templates may strip what is said
            marks = Marks.unused_in(turn.text for turn in conversation)
            turns = tuple(_with_text(turn, marks.wrap(changed(turn.text))) if turn.learn else turn for turn in conversation)
            plain, spans = marks.strip(self.rendered(turns, ask=last is None))
            same = plain.startswith(prompt) if last else plain == prompt
            if last and last.text != last.text.strip():
                same = same and plain == self.rendered(conversation, ask=False)
            if same and len(spans) == len(answered):
                glue = plain[len(before) : spans[-1][0]] if plain.startswith(before) else ""
                begins = [self._begin(conversation[:at], plain, span, glue) for at, span in zip(answered, spans, strict=True)]
                within = [(begin, span[1]) for begin, span in zip(begins, spans, strict=True)]
                if last is None:
                    return within, "", self.spread.end_id
                space, end_id = self._end(plain[spans[-1][1] :])
                return within[:-1], plain[len(before) : spans[-1][1]] + space, end_id
        if last is None:
            return [], "", self.spread.end_id  # what is only read need not be known
        raise RequestError(
            "the checkpoint's chat template changes what the assistant says, or writes it differently once it has been said: "
            "what is to be learned cannot be known. Name another one: data.template"
        )

    def _end(self, behind: str) -> tuple[str, int]:
        """The white space and the token that the template ends an answer with; where it does not, none and the usual token."""
        rest = behind.lstrip()
        for end in sorted(self.ends):
            if rest.startswith(self.tokenizer.hf_tokenizer.convert_ids_to_tokens(end)):
                return behind[: len(behind) - len(rest)], end
        return "", self.spread.end_id

    def _begin(self, before: Conversation, text: str, span: Span, glue: str) -> int:
        """Where the answer begins: after the prompt, which may leave the space after "ASSISTANT:" to the answer."""
        if span[0] == span[1]:
            return span[0]
        if not self._templated(before):
            prompt = self.rendered(before, ask=True)
            return len(prompt) if text.startswith(prompt) else span[0]
        begin = span[0] - len(glue)  # a template writes the same before every answer
        return begin if begin >= 0 and text[begin : span[0]] == glue else span[0]

    def _message(self, turn: Turn) -> dict[str, Any]:
        """A turn in the form chat templates read: of a language model alone, just its text."""
        if not self.has_vision:
            return {"role": turn.role, "content": turn.text}
        parts = [{"type": "text", "text": str(p.text)} if isinstance(p, Text) else {"type": "image"} for p in turn.content]
        return {"role": turn.role, "content": parts}

    def _check(self, conversation: Conversation) -> None:
        media = media_of(conversation)
        if media and not self.has_vision:
            raise RequestError(LANGUAGE_ONLY)
        if self.has_vision and any(self.image_token in turn.text for turn in conversation):
            raise RequestError(
                f"a text says {self.image_token!r}, which marks an image in this checkpoint's texts: write it differently"
            )

    def _check_pictures(self, written: TokenizedConversation, prompt: str, conversation: Conversation) -> None:
        """Checks that the tokenizer made as many image tokens as the text has."""
        if not self.has_vision:
            return
        expected, found = prompt.count(self.image_token), int((written.tokens == self.spread.image_id).sum())
        pictures = len(media_of(conversation))
        if found != expected:
            raise RequestError(
                f"the tokenizer gives {found} picture tokens where the text has {expected}: is {self.image_token!r} one of its "
                "special tokens?"
            )
        if expected % max(pictures, 1) or (expected > 0) != (pictures > 0):
            raise RequestError(
                f"the conversation has {pictures} pictures and the chat template writes {expected} of {self.image_token!r}"
            )

    def _check_said(self, prompt: str, conversation: Conversation) -> None:
        """Checks that a checkpoint's own template, which may be damaged, writes something of the last turn.

        Of pictures there is a check already.
        """
        if self.template in NAMED or not self._templated(conversation) or media_of(conversation):
            return
        words = [word for part in conversation[-1].content for word in part.text.split()]
        written = prompt.lower()
        if words and not any(word.lower() in written for word in sorted(words, key=len)[-3:]):
            raise RequestError(
                "the checkpoint's chat template writes nothing of what is said; look into chat_template.jinja, or "
                "'chat_template' of tokenizer_config.json, or fetch them again"
            )


def _with_text(turn: Turn, text: str) -> Turn:
    return dataclasses.replace(turn, content=(Text(text),))
