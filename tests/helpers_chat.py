"""Chat templates in the public formats of the families, tokenizers with their tokens, and MLC's JSON FFI's rules."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from helpers_models import DEMO, write_model
from tokenizers import AddedToken, Tokenizer

Conversation = list[tuple[str, str]]

_ALTERNATE = (
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('Roles must alternate') }}{% endif %}"
)
_SPLIT = (
    "{% if messages[0].role == 'system' %}{% set said = messages[1:] %}{% set system = messages[0].content %}"
    "{% else %}{% set said = messages %}{% set system = '' %}{% endif %}"
)
_CHATML = "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
_CHATML_ASK = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
_HEADER = "'<|start_header_id|>' + m.role + '<|end_header_id|>\n\n'"
_HEADER_ASK = "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"

LLAMA2 = (
    _SPLIT + "{% for m in said %}" + _ALTERNATE + "{% set text = m.content %}{% if loop.first and system %}"
    "{% set text = '<<SYS>>\n' + system + '\n<</SYS>>\n\n' + m.content %}{% endif %}"
    "{% if m.role == 'user' %}{{ bos_token + '[INST] ' + text.strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + text.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
LLAMA3 = (
    "{% for m in messages %}{% set text = " + _HEADER + " + m.content | trim + '<|eot_id|>' %}"
    "{{ bos_token + text if loop.first else text }}{% endfor %}" + _HEADER_ASK
)
LLAMA31 = (
    "{{ bos_token }}" + _SPLIT + "{% if not date_string is defined %}{% if strftime_now is defined %}"
    "{% set date_string = strftime_now('%d %b %Y') %}{% else %}{% set date_string = '26 Jul 2024' %}{% endif %}"
    "{% endif %}{{ '<|start_header_id|>system<|end_header_id|>\n\n' }}"
    "{{ 'Today Date: ' + date_string + '\n\n' + system | trim + '<|eot_id|>' }}"
    "{% for m in said %}{{ " + _HEADER + " + m.content | trim + '<|eot_id|>' }}{% endfor %}" + _HEADER_ASK
)
MISTRAL1 = (
    "{{ bos_token }}{% for m in messages %}"
    + _ALTERNATE
    + "{% if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}"
    "{% elif m.role == 'assistant' %}{{ m.content + eos_token + ' ' }}{% endif %}{% endfor %}"
)
MISTRAL2 = (  # the system message in the first user message
    _SPLIT + "{{ bos_token }}{% for m in said %}" + _ALTERNATE + "{% if m.role == 'user' %}"
    "{% if loop.first and system %}{{ ' [INST] ' + system + '\n\n' + m.content + ' [/INST]' }}"
    "{% else %}{{ ' [INST] ' + m.content + ' [/INST]' }}{% endif %}"
    "{% else %}{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}"
)
MISTRAL3 = MISTRAL2.replace("loop.first", "loop.last")  # in the last user message
QWEN2 = (
    "{% for m in messages %}{% if loop.first and m.role != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{% endif %}"
    + _CHATML
    + "{% endfor %}"
    + _CHATML_ASK
)
QWEN3 = (
    "{% set ns = namespace(last=-1) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}"
    "{% endif %}{% endfor %}{% for m in messages %}{% set text = m.content %}"
    "{% if m.role == 'assistant' and '</think>' in text and loop.index0 < ns.last %}"
    "{% set text = text.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    "{{ '<|im_start|>' + m.role + '\n' + text + '<|im_end|>\n' }}{% endfor %}" + _CHATML_ASK
)

_LLAMA3_TOKENS = ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
_S = ("<s>", "</s>")
# family → (template, added tokens, of which the first is the begin and the second the end token)
FAMILIES: dict[str, tuple[str, tuple[str, ...]]] = {
    "llama-2": (LLAMA2, _S),
    "llama-3": (LLAMA3, _LLAMA3_TOKENS),
    "llama-3.1": (LLAMA31, _LLAMA3_TOKENS),
    "mistral-0.1": (MISTRAL1, _S),
    "mistral-0.2": (MISTRAL2, _S),
    "mistral-0.3": (MISTRAL3, (*_S, "[INST]", "[/INST]")),
    "qwen2": (QWEN2, ("", "<|im_end|>", "<|im_start|>", "<|endoftext|>")),
    "qwen3": (QWEN3, ("", "<|im_end|>", "<|im_start|>", "<think>", "</think>")),
}


def write_chat_model(folder: Path, template: str | None, tokens: tuple[str, ...], **changed: Any) -> Path:
    """A small model whose tokenizer knows `tokens` (begin, end, others), with a chat template."""
    tokenizer = Tokenizer.from_file(str(DEMO / "tokenizer.json"))
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in tokens if token])
    size = tokenizer.get_vocab_size()
    end = tokenizer.token_to_id(tokens[1])
    write_model(folder, **{"vocab_size": size, "bos_token_id": None, "eos_token_id": end} | changed)
    tokenizer.save(str(folder / "tokenizer.json"))
    data: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": tokens[1]}
    data |= {"bos_token": tokens[0]} if tokens[0] else {}
    data |= {"chat_template": template} if template is not None else {}
    (folder / "tokenizer_config.json").write_text(json.dumps(data))
    return folder


def family(folder: Path, name: str) -> Path:
    """A small model with a family's chat template."""
    return write_chat_model(folder, *FAMILIES[name])


def cpp_prompt(conv: dict[str, Any], messages: Conversation) -> str:
    """What MLC's JSON FFI makes of a request, which is what apps run: the rules of its conv_template.cc, in Python."""
    custom = "".join(text for role, text in messages if role == "system")
    system = custom if any(role == "system" for role, _ in messages) else conv["system_message"]
    pending = conv["system_template"].replace("{system_message}", system, 1)
    last_user = max(i for i, (role, _) in enumerate(messages) if role == "user")
    count = 0
    for index, (role, said) in enumerate(messages):
        if role == "system":
            continue
        text, close = said, said.rfind("</think>")
        if conv["strip_reasoning_in_history"] and role == "assistant" and index < last_user and close >= 0:
            text = said[close + len("</think>") :].lstrip("\n")
        count += 1
        separator = conv["seps"][(role == "assistant") % len(conv["seps"])]
        if conv["add_role_after_system_message"] or pending == "" or count != 1:
            pending += conv["roles"][role] + conv["role_content_sep"]
        pending += conv["role_templates"][role].replace(f"{{{role}_message}}", text, 1) + separator
    return str(pending + conv["roles"]["assistant"] + conv["role_empty_sep"])
