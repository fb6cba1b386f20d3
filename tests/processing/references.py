"""What transformers itself makes of a conversation: tokens and pixels, from tiny checkpoints with the published templates.

family = FAMILIES["llava"]
processor = family.make(folder, "prepend")
messages = random_conversation(seed, pictures, **family.said)
family.reference(processor, messages[:-1])
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from conversations import Message
from PIL import Image, ImageOps
from tiny_tokenizers import BOS, EOS, IMAGE, PAD, tokenizer
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    GemmaConfig,
    Idefics2Config,
    Idefics2ForConditionalGeneration,
    Idefics2ImageProcessorPil,
    Idefics2Processor,
    IdeficsConfig,
    IdeficsForVisionText2Text,
    IdeficsImageProcessorPil,
    IdeficsProcessor,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextImageProcessorPil,
    LlavaNextProcessor,
    LlavaProcessor,
    MistralConfig,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    PaliGemmaProcessor,
    PreTrainedTokenizerBase,
    SiglipImageProcessorPil,
    SiglipVisionConfig,
)

SIDE, PATCH = 16, 4
PINPOINTS = [[16, 32], [32, 16], [32, 32], [48, 16], [16, 48]]
TEXT = dict(
    hidden_size=32,
    intermediate_size=40,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=2048,
    pad_token_id=PAD,
    eos_token_id=EOS,
    bos_token_id=BOS,
)
TOWER = dict(
    hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=3, image_size=SIDE, patch_size=PATCH
)
FAKE, END = "<fake_token_around_image>", "<end_of_utterance>"

# As published with llava-1.5-7b-hf, llava-v1.6-mistral-7b-hf, idefics2-8b, and many, and Mistral-7B-Instruct-v0.2.
LLAVA_CHAT = (
    "{% for message in messages %}{% if message['role'] != 'system' %}{{ message['role'].upper() + ': '}}{% endif %}"
    "{# Render all images first #}{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}"
    "{{ '<image>\\n' }}{% endfor %}{# Render all text next #}{% if message['role'] != 'assistant' %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ content['text'] + ' '}}{% endfor %}"
    "{% else %}{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{% generation %}{{ content['text'] + ' '}}{% endgeneration %}{% endfor %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
LLAVA_NEXT_CHAT = (
    "{% for message in messages %}{% if message['role'] == 'system' %}"
    "{{ '<<SYS>>\\n' + message['content'][0]['text'] + '\\n<</SYS>>\\n\\n' }}{% elif message['role'] == 'user' %}"
    "{{ '[INST] ' }}{# Render all images first #}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\\n' }}{% endfor %}"
    "{# Render all text next #}{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{{ content['text'] }}{% endfor %}{{' [/INST]' }}{% elif message['role'] == 'assistant' %}"
    "{{ ' ' + message['content'][0]['text'] + '</s> '}}{% else %}"
    "{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"
)
IDEFICS2_CHAT = (
    "{% for message in messages %}{{message['role'].capitalize()}}"
    "{% if message['content'][0]['type'] == 'image' %}{{':'}}{% else %}{{': '}}{% endif %}"
    "{% for line in message['content'] %}{% if line['type'] == 'text' %}{{line['text']}}"
    "{% elif line['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}<end_of_utterance>\n{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
MISTRAL_CHAT = (
    "{{ bos_token }}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ message['content'] + eos_token}}"
    "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"
)


@dataclasses.dataclass(frozen=True)
class Reference:
    ids: list[int]
    pixels: list[list[np.ndarray]]  # of each picture its tiles, [H, W, 3] uint8 before they are normalised
    sees: np.ndarray | None = None  # IDEFICS: [tokens, pictures (at least 1)] bool


@dataclasses.dataclass(frozen=True)
class Family:
    make: Callable[[Path, str], Any]  # (folder, style of the tokenizer) -> the processor, or the tokenizer of a language model
    reference: Callable[[Any, Sequence[Message]], Reference]
    said: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # what `random_conversation` must keep to
    system: bool = False  # whether it reads a system message


def _saved(folder: Path, model: torch.nn.Module, processor: Any) -> Any:
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return processor


def llava(folder: Path, style: str, chat: str = LLAVA_CHAT) -> LlavaProcessor:
    words = tokenizer(style)
    text, vision = LlamaConfig(**TEXT, vocab_size=len(words)), CLIPVisionConfig(**TOWER)
    config = LlavaConfig(text_config=text, vision_config=vision, image_token_index=IMAGE, image_seq_length=(SIDE // PATCH) ** 2)
    pixels = CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})
    processor = LlavaProcessor(pixels, words, PATCH, "default", chat, num_additional_image_tokens=1)
    return _saved(folder, LlavaForConditionalGeneration(config), processor)


def llava_next(folder: Path, style: str, chat: str = LLAVA_NEXT_CHAT) -> LlavaNextProcessor:
    words = tokenizer(style)
    text, vision = MistralConfig(**TEXT, vocab_size=len(words)), CLIPVisionConfig(**TOWER)
    config = LlavaNextConfig(text_config=text, vision_config=vision, image_token_index=IMAGE, image_grid_pinpoints=PINPOINTS)
    sizes = dict(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})
    pixels = LlavaNextImageProcessorPil(**sizes, image_grid_pinpoints=PINPOINTS)
    processor = LlavaNextProcessor(pixels, words, PATCH, "default", chat, num_additional_image_tokens=1)
    return _saved(folder, LlavaNextForConditionalGeneration(config), processor)


def idefics(folder: Path, style: str) -> IdeficsProcessor:
    words = tokenizer(style, FAKE)
    resampler = dict(use_resampler=True, resampler_depth=1, resampler_n_heads=2, resampler_head_dim=8, resampler_n_latents=4)
    tower = dict(embed_dim=24, image_size=SIDE, patch_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=40)
    text = {name: value for name, value in TEXT.items() if name != "num_key_value_heads"}
    config = IdeficsConfig(
        **text,
        vocab_size=len(words) - 2,
        additional_vocab_size=2,
        cross_layer_interval=2,
        qk_layer_norms=True,
        use_resampler=True,
        vision_config=tower,
        perceiver_config=resampler | dict(qk_layer_norms_perceiver=True),
    )
    processor = IdeficsProcessor(IdeficsImageProcessorPil(image_size=SIDE), words)
    return _saved(folder, IdeficsForVisionText2Text(config), processor)


def idefics2(folder: Path, style: str, split: bool = False) -> Idefics2Processor:
    words = tokenizer(style, FAKE, END, extra_special_tokens=dict(image_token="<image>", image_boundary_token=FAKE))
    resampler = dict(
        hidden_size=32,
        resampler_n_latents=3,
        resampler_depth=1,
        resampler_n_heads=4,
        resampler_head_dim=6,
        num_key_value_heads=2,
    )
    config = Idefics2Config(
        text_config=MistralConfig(**TEXT, sliding_window=None, vocab_size=len(words)),
        vision_config=TOWER | dict(image_size=24),
        perceiver_config=resampler,
        image_token_id=IMAGE,
        pad_token_id=PAD,
    )
    pixels = Idefics2ImageProcessorPil(size=dict(shortest_edge=12, longest_edge=36), do_image_splitting=split)
    processor = Idefics2Processor(pixels, words, image_seq_len=3, chat_template=IDEFICS2_CHAT)
    return _saved(folder, Idefics2ForConditionalGeneration(config), processor)


def paligemma(folder: Path, style: str) -> PaliGemmaProcessor:
    pixels = SiglipImageProcessorPil(size={"height": SIDE, "width": SIDE})
    pixels.image_seq_length = (SIDE // PATCH) ** 2
    processor = PaliGemmaProcessor(pixels, tokenizer(style))
    text = GemmaConfig(**TEXT | dict(num_key_value_heads=1), head_dim=8, vocab_size=len(processor.tokenizer))
    vision = SiglipVisionConfig(**TOWER, vision_use_head=False)
    config = PaliGemmaConfig(text_config=text, vision_config=vision, image_token_index=IMAGE, projection_dim=32)
    return _saved(folder, PaliGemmaForConditionalGeneration(config), processor)


def language(folder: Path, style: str, chat: str = CHATML) -> PreTrainedTokenizerBase:
    words = tokenizer(style, *(("<|im_start|>", "<|im_end|>") if chat == CHATML else ()), chat_template=chat)
    return _saved(folder, LlamaForCausalLM(LlamaConfig(**TEXT, vocab_size=len(words))), words)


def opened(messages: Sequence[Message]) -> list[Image.Image]:
    """The pictures in their own modes, not turned."""
    found = [part["image"] for message in messages for part in message["content"] if part["type"] == "image"]
    return [one if isinstance(one, Image.Image) else Image.open(one) for one in found]


def upright(messages: Sequence[Message]) -> list[Image.Image]:
    return [ImageOps.exif_transpose(one) for one in opened(messages)]


RAW = dict(do_rescale=False, do_normalize=False)


def _tiles(array: Any) -> list[np.ndarray]:
    """[..., 3, H, W] of whole numbers -> [H, W, 3] each."""
    pixels = np.asarray(array)
    assert (pixels == pixels.astype(np.uint8)).all()
    return list(np.moveaxis(pixels.reshape(-1, *pixels.shape[-3:]), 1, -1).astype(np.uint8))


def _asked(processor: Any, messages: Sequence[Message], pictures: Any, **settings: Any) -> Any:
    text = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    settings |= dict(add_special_tokens=False) if text.startswith(processor.tokenizer.bos_token) else {}
    return processor(images=pictures or None, text=[text], **RAW, **settings)


def llava_reference(processor: LlavaProcessor, messages: Sequence[Message]) -> Reference:
    inputs = _asked(processor, messages, upright(messages))
    return Reference(inputs["input_ids"][0], [_tiles(one) for one in inputs.get("pixel_values", [])])


def llava_next_reference(processor: LlavaNextProcessor, messages: Sequence[Message]) -> Reference:
    pictures = upright(messages)
    inputs = _asked(processor, messages, pictures, **(dict(do_pad=False) if pictures else {}))
    return Reference(inputs["input_ids"][0], [_tiles(one) for one in inputs.get("pixel_values", [])])


def idefics2_reference(processor: Idefics2Processor, messages: Sequence[Message]) -> Reference:
    """Their processor turns the pictures, and drops what is transparent in them, itself."""
    pictures = opened(messages)
    inputs = _asked(processor, messages, [pictures] if pictures else None, do_pad=False)
    tiles = [tile for one in inputs.get("pixel_values", [[]])[0] for tile in _tiles(one)]
    count = 5 if processor.image_processor.do_image_splitting else 1
    return Reference(inputs["input_ids"][0], [tiles[start : start + count] for start in range(0, len(tiles), count)])


def idefics_reference(processor: IdeficsProcessor, messages: Sequence[Message]) -> Reference:
    """Their list of texts and pictures is "Q1 A1\\nQ2", cut at the pictures."""
    pictures = iter(upright(messages))
    prompt: list[Any] = []
    for message in messages:
        answer = message["role"] == "assistant"
        parts = [next(pictures) if part["type"] == "image" else part["text"] for part in message["content"]]
        for part in [" ", *parts, "\n"] if answer else parts:
            if isinstance(part, str) and prompt and isinstance(prompt[-1], str):
                prompt[-1] += part
            elif part != "":
                prompt.append(part)
    inputs = processor(text=[prompt], **RAW)
    count = sum(not isinstance(part, str) for part in prompt)
    pixels = [_tiles(one) for one in inputs["pixel_values"][0][:count]]
    return Reference(inputs["input_ids"][0].tolist(), pixels, inputs["image_attention_mask"][0].bool().numpy())


def paligemma_reference(processor: PaliGemmaProcessor, messages: Sequence[Message]) -> Reference:
    """The pictures (at least one), and then "Q1\\nA1\\nQ2"; their processor adds the last newline."""
    pictures = upright(messages)
    text = "<image>" * len(pictures) + "\n".join(message["content"] for message in strings(messages))
    inputs = processor(images=pictures, text=text, **RAW)
    return Reference(inputs["input_ids"][0], [_tiles(one) for one in inputs["pixel_values"]])


def language_reference(words: PreTrainedTokenizerBase, messages: Sequence[Message]) -> Reference:
    settings = dict(add_generation_prompt=True, tokenize=True, return_dict=False)
    return Reference(words.apply_chat_template(strings(messages), **settings), [])


def strings(messages: Sequence[Message]) -> list[dict[str, str]]:
    """Every message's text as one string, without its pictures."""
    joined = lambda message: "".join(part["text"] for part in message["content"] if part["type"] == "text")
    return [{"role": message["role"], "content": joined(message)} for message in messages]


# A picture one pixel high has no upper crops (they divide by zero), and one of one pixel's width black ones.
FAMILIES = {
    "llava": Family(llava, llava_reference, system=True),
    "llava_next": Family(llava_next, llava_next_reference, system=True),
    "idefics": Family(idefics, idefics_reference),
    "idefics2": Family(idefics2, idefics2_reference, system=True),
    "idefics2_split": Family(functools.partial(idefics2, split=True), idefics2_reference, dict(least_side=2), system=True),
    "paligemma": Family(paligemma, paligemma_reference, dict(least_pictures=1)),
    "chatml": Family(language, language_reference, dict(most_pictures=0), system=True),
    "mistral": Family(functools.partial(language, chat=MISTRAL_CHAT), language_reference, dict(most_pictures=0)),
}
