"""Chat templates by name, in Jinja as transformers reads them, and how any template is rendered.

The names and the texts are LLaVA's (`llava/conversation.py`); `<image>` stands where the picture does in a turn, before its
text. A checkpoint's own template is used unless `data.template` names one of these.
"""

from __future__ import annotations

from typing import Any

from vlm_jax.errors import RequestError, first_line
from vlm_jax.processing.template_process import PROCESS, TemplateFailure

# What a turn says: its pictures, then its texts.
_SAID = (
    "{%- macro said(message) -%}{%- if message['content'] is string -%}{{ message['content'] }}{%- else -%}"
    "{%- for part in message['content'] if part['type'] == 'image' -%}{{ '<image>\\n' }}{%- endfor -%}"
    "{%- for part in message['content'] if part['type'] == 'text' -%}{{ part['text'] }}{%- endfor -%}"
    "{%- endif -%}{%- endmacro -%}"
)

TEMPLATES = {
    "vicuna_v1": _SAID
    + "{%- if messages[0]['role'] == 'system' -%}{{ said(messages[0]) + ' ' }}{%- else -%}"
    + "{{ 'A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, and "
    + "polite answers to the user\\'s questions. ' }}{%- endif -%}"
    + "{%- for message in messages -%}{%- if message['role'] == 'user' -%}{{ 'USER: ' + said(message) + ' ' }}"
    + "{%- elif message['role'] == 'assistant' -%}{{ 'ASSISTANT: ' + said(message) + eos_token }}{%- endif -%}{%- endfor -%}"
    + "{%- if add_generation_prompt -%}{{ 'ASSISTANT:' }}{%- endif -%}",
    "llama_2": _SAID
    + "{%- set start = namespace(system='') -%}"
    + "{%- for message in messages -%}{%- if message['role'] == 'system' -%}"
    + "{%- set start.system = '<<SYS>>\\n' + said(message) + '\\n<</SYS>>\\n\\n' -%}"
    + "{%- elif message['role'] == 'user' -%}{{ bos_token + '[INST] ' + start.system + said(message) + ' [/INST]' }}"
    + "{%- set start.system = '' -%}"
    + "{%- else -%}{{ ' ' + said(message) + ' ' + eos_token }}{%- endif -%}{%- endfor -%}",
    "mistral": _SAID
    + "{{ bos_token }}{%- for message in messages -%}{%- if message['role'] == 'assistant' -%}{{ said(message) + eos_token }}"
    + "{%- else -%}{{ '[INST] ' + said(message) + ' [/INST]' }}{%- endif -%}{%- endfor -%}",
    "chatml": _SAID
    + "{%- for message in messages -%}{{ '<|im_start|>' + message['role'] + '\\n' + said(message) + '<|im_end|>\\n' }}"
    + "{%- endfor -%}{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}",
    # Of pretraining on captions: the question is thrown away, the caption and a line break follow the picture.
    "plain": "{%- for message in messages -%}{%- if message['content'] is string -%}"
    "{%- if message['role'] == 'assistant' -%}{{ message['content'] + '\\n' }}{%- endif -%}{%- else -%}"
    "{%- for part in message['content'] -%}{%- if part['type'] == 'image' -%}{{ '<image>' }}"
    "{%- elif message['role'] == 'assistant' -%}{{ part['text'] + '\\n' }}{%- endif -%}"
    "{%- endfor -%}{%- endif -%}{%- endfor -%}",
}


LINE = "plain"  # the template whose answers end in a line break, and in no end token


def named_template(name: str) -> str:
    """
    Raises:
      RequestError: there is no template of that name.
    """
    if name not in TEMPLATES:
        raise RequestError(f"data.template={name!r}: expected one of {', '.join(TEMPLATES)}, or '' for the checkpoint's own")
    return TEMPLATES[name]


def render(template: str, messages: list[dict[str, Any]], *, ask: bool, special: dict[str, Any]) -> str:
    """A chat as text, with a bound on the time and the memory that this takes.

    Args:
      ask: end where the assistant is to speak.
      special: the tokenizer's special tokens by name, which templates write.

    Raises:
      RequestError: the template refuses these turns, is wrong, or takes too long.
    """
    tokens = {name: list(map(str, found)) if isinstance(found, list | tuple) else str(found) for name, found in special.items()}
    variables = dict(messages=messages, tools=None, documents=None, add_generation_prompt=ask)
    try:
        return PROCESS.render(template, tokens | variables)
    except TemplateFailure as error:
        roles = ", ".join(message["role"] for message in messages)
        raise RequestError(
            f"the checkpoint's chat template refuses turns of {roles}: {first_line(error)}. Change the turns, or the template: "
            "chat_template.jinja, or 'chat_template' of tokenizer_config.json"
        ) from None
