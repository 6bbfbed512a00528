"""A model's own chat template (Jinja): where it is, and what it makes of conversations."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from awq_compile import settings
from awq_compile.chat.conv_template import Message
from awq_compile.errors import ModelError
from awq_compile.models.config import JsonFile

_MAX_TEMPLATE_BYTES: Final = 1 << 20
_SECONDS: Final = 5  # of processor time for all conversations, which take milliseconds
_MEMORY_BYTES: Final = 1 << 30
_SPECIAL: Final = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


@dataclass(frozen=True)
class JinjaTemplate:
    """A chat template and the special tokens that it may name."""

    text: str
    variables: dict[str, str]  # bos_token, eos_token, …
    where: str  # for messages


@dataclass(frozen=True)
class Refused:
    """Why a template rendered nothing for a conversation."""

    reason: str


def read_jinja_template(folder: Path) -> JinjaTemplate | None:
    """The chat template that transformers would take: chat_template.jinja, else the one of tokenizer_config.json.

    None when the model has none. Raises `ModelError` for a file that cannot be used.
    """
    config = folder / "tokenizer_config.json"
    variables = special_tokens(folder)
    own = folder / "chat_template.jinja"
    if own.is_file():
        try:
            if own.stat().st_size > _MAX_TEMPLATE_BYTES:
                raise ModelError(f"{own}: {own.stat().st_size} bytes, and at most {_MAX_TEMPLATE_BYTES} are read")
            return JinjaTemplate(own.read_text(encoding="utf-8"), variables, str(own))
        except (OSError, UnicodeDecodeError) as error:
            raise ModelError(f"{own} cannot be read: {error}") from None
    value = JsonFile(config).data.get("chat_template") if config.is_file() else None
    if isinstance(value, list):  # several, by name
        named = {one.get("name"): one.get("template") for one in value if isinstance(one, dict)}
        value = named.get("default")
        if value is None:
            raise ModelError(f"{config}: chat_template has {sorted(map(str, named))}, and none is called 'default'")
    if value is None:
        return None
    if not isinstance(value, str) or len(value) > _MAX_TEMPLATE_BYTES:
        raise ModelError(f"{config}: chat_template is {value!r:.80}, expected a template of up to 1 MiB")
    return JinjaTemplate(value, variables, f"{config}: chat_template")


def special_tokens(folder: Path) -> dict[str, str]:
    """Text of each special token by its name in tokenizer_config.json; older files hold an object with `content`."""
    path = folder / "tokenizer_config.json"
    data = JsonFile(path).data if path.is_file() else {}
    found = {}
    for name in _SPECIAL:
        value: Any = data.get(name)
        value = value.get("content") if isinstance(value, dict) else value
        if value is not None and not isinstance(value, str):
            raise ModelError(f"{path}: {name} is {value!r:.80}, expected a token's text")
        if value is not None:
            found[name] = value
    return found


def render(
    template: JinjaTemplate, conversations: Sequence[Sequence[Message]], *, today: str | None = None
) -> list[str | Refused]:
    """Each conversation's prompt, up to where the assistant's next answer begins.

    Another process does it, under limits: a template may loop for ever or fill the memory. `today` is what
    `strftime_now` gives; without it a template finds no such function. Raises `ModelError` at a limit.
    """
    request = {
        "template": template.text,
        "variables": template.variables,
        "conversations": [[{"role": role, "content": text} for role, text in one] for one in conversations],
        "today": today,
        "seconds": _SECONDS,
        "bytes": _MEMORY_BYTES,
    }
    worker = Path(__file__).with_name("render_worker.py")
    try:
        done = subprocess.run(
            [sys.executable, "-P", str(worker)],
            input=json.dumps(request),
            capture_output=True,
            text=True,
            encoding="utf-8",
            timeout=12 * _SECONDS,
            check=False,
            env=settings.environment(),
        )
    except subprocess.TimeoutExpired:
        raise _limits(template) from None
    if done.returncode != 0:
        if "ModuleNotFoundError" in done.stderr:
            raise ModuleNotFoundError("No module named 'jinja2'", name="jinja2")
        raise _limits(template)
    return [one["text"] if "text" in one else Refused(one["error"]) for one in json.loads(done.stdout)]


def _limits(template: JinjaTemplate) -> ModelError:
    return ModelError(
        f"{template.where} was stopped: rendering a few short conversations took more than {_SECONDS} s "
        f"or {_MEMORY_BYTES >> 20} MiB",
        hint="--conv-template FILE gives the conversation template in MLC's form; --conv-template plain for none",
    )
