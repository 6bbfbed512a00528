"""`ConvTemplate`: MLC's form of a chat template, read strictly, and the prompt that MLC's engines make of it.

The rules are those of MLC's Python engine and of its JSON FFI, which apps use; where the two differ (a placeholder that
occurs twice, tools), the form is refused or does not occur here.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Final

from awq_compile.errors import AwqCompileError, UsageError

Message = tuple[str, str]  # (role, content); role is system, user or assistant

PLAIN: Final = "plain"  # the template in which a prompt reaches the model as it is
SYSTEM: Final = "{system_message}"
_FUNCTION: Final = "{function_string}"
_ROLES: Final = ("user", "assistant", "tool")
_THINK_END: Final = "</think>"


def placeholder(role: str) -> str:
    """What a role's template holds in the place of a message."""
    return f"{{{role}_message}}"


def _plain_roles() -> dict[str, str]:
    return {role: placeholder(role) for role in _ROLES}


@dataclass(frozen=True)
class ConvTemplate:
    """A conversation's form; fields as MLC names them.

    A prompt is `system_template` with the system message (else `system_message`), then for each message
    `roles[role] + role_content_sep + role_templates[role] + sep`, then `roles["assistant"] + role_empty_sep`.
    sep is `seps[0]` behind the user's messages and `seps[-1]` behind the assistant's. Without
    `add_role_after_system_message` the first message has no role, when there is a system text.
    `system_prefix_token_ids` go before the prompt's tokens, which are made without the tokenizer's own special ones.
    """

    roles: dict[str, str]
    seps: tuple[str, ...]
    name: str = "custom"
    system_template: str = SYSTEM
    system_message: str = ""
    system_prefix_token_ids: tuple[int, ...] = ()
    add_role_after_system_message: bool = True
    role_templates: dict[str, str] = field(default_factory=_plain_roles)
    messages: tuple[Message, ...] = ()
    role_content_sep: str = ""
    role_empty_sep: str = ""
    stop_str: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    strip_reasoning_in_history: bool = False
    function_string: str = ""
    use_function_calling: bool = False

    def prompt(self, messages: Sequence[Message]) -> str:
        """The text of a conversation, up to where the assistant's next answer begins.

        At most one system message is used, the last. Raises `UsageError` for a role that the template lacks.
        """
        system = [content for role, content in messages if role == "system"]
        text = self.system_template.replace(SYSTEM, system[-1] if system else self.system_message)
        said = [*self.messages, *((role, content) for role, content in messages if role != "system")]
        if self.strip_reasoning_in_history:
            said = _without_reasoning(said)
        roleless = not self.add_role_after_system_message and text != ""
        for index, (role, content) in enumerate(said):
            if role not in self.roles:
                raise UsageError(f"the conversation template has no role {role!r}, only {', '.join(self.roles)}")
            if not (roleless and index == 0):
                text += self.roles[role] + self.role_content_sep
            text += self.role_templates[role].replace(_FUNCTION, "").replace(placeholder(role), content)
            text += self.seps[-1] if role == "assistant" else self.seps[0]
        return text + self.roles["assistant"] + self.role_empty_sep

    def to_json(self) -> dict[str, Any]:
        """The value of `conv_template` in mlc-chat-config.json; `from_json` is the inverse."""
        data: dict[str, Any] = {one.name: _plain(getattr(self, one.name)) for one in fields(self)}
        if not self.system_prefix_token_ids:  # MLC's engines would put an empty piece before the prompt
            del data["system_prefix_token_ids"]
        return data

    @staticmethod
    def from_json(data: Any, where: str, error: type[AwqCompileError]) -> ConvTemplate:
        """Reads MLC's form from outside. Raises `error`, naming `where`, the key and the value that does not fit."""
        return _Reader(where, error).template(data)


def _plain(value: Any) -> Any:
    return [_plain(one) for one in value] if isinstance(value, tuple) else value


def _without_reasoning(messages: Sequence[Message]) -> list[Message]:
    """Drops what ends in </think> from the assistant's messages before the user's last, as Qwen3's template does."""
    last = max((i for i, (role, _) in enumerate(messages) if role == "user"), default=-1)
    return [
        (role, text.rpartition(_THINK_END)[2].lstrip("\n"))
        if role == "assistant" and i < last and _THINK_END in text
        else (role, text)
        for i, (role, text) in enumerate(messages)
    ]


@dataclass(frozen=True)
class _Reader:
    """Types of the keys. Unlike MLC's engines it says what is wrong with which."""

    where: str
    error: type[AwqCompileError]

    def fail(self, key: str, value: Any, expected: str) -> AwqCompileError:
        return self.error(f"{self.where}: {key} is {value!r:.80}, expected {expected}")

    def template(self, data: Any) -> ConvTemplate:
        if not isinstance(data, dict):
            raise self.fail("the conversation template", data, "a JSON object")
        readers: dict[str, Callable[[str, Any], Any]] = {
            "str": self.text,
            "bool": self.flag,
            "tuple[int, ...]": self.tokens,
            "tuple[str, ...]": self.texts,
            "dict[str, str]": self.by_role,
            "tuple[Message, ...]": self.history,
        }
        kinds = {one.name: readers[str(one.type)] for one in fields(ConvTemplate)}
        for key in data:
            if key not in kinds:
                near = difflib.get_close_matches(str(key), list(kinds), n=1)
                hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(kinds)}"
                raise self.error(f"{self.where}: unknown key {str(key)!r:.80}", hint=hint)
        given = {key: kinds[key](key, value) for key, value in data.items() if value is not None}
        for required in ("roles", "seps"):
            if required not in given:
                raise self.error(f"{self.where}: key {required!r} is missing")
        given["role_templates"] = _plain_roles() | given.get("role_templates", {})
        template = ConvTemplate(**given)
        self.check(template)
        return template

    def check(self, template: ConvTemplate) -> None:
        """What the keys must be together."""
        if len(template.seps) not in (1, 2):
            raise self.fail("seps", list(template.seps), "one separator, or two: the user's and the assistant's")
        for role in ("user", "assistant"):
            if role not in template.roles:
                raise self.error(f"{self.where}: roles has no {role!r}")
        if template.system_template.count(SYSTEM) > 1:
            raise self.fail("system_template", template.system_template, f"{SYSTEM} at most once")
        for role, text in template.role_templates.items():
            if text.count(placeholder(role)) != 1:
                raise self.fail(f"role_templates.{role}", text, f"{placeholder(role)} in it, once")
        for role in template.roles:
            if role not in template.role_templates:
                raise self.error(f"{self.where}: roles has {role!r}, and role_templates has not")
        for role, _ in template.messages:
            if role not in template.roles:
                raise self.error(f"{self.where}: messages has the role {role!r}, and roles has not")

    def text(self, key: str, value: Any) -> str:
        if not isinstance(value, str):
            raise self.fail(key, value, "a string")
        if any("\ud800" <= letter <= "\udfff" for letter in value):  # JSON can hold half of a surrogate pair
            raise self.fail(key, value, "Unicode text")
        return value

    def flag(self, key: str, value: Any) -> bool:
        if not isinstance(value, bool):
            raise self.fail(key, value, "true or false")
        return value

    def items(self, key: str, value: Any) -> list[Any]:
        if not isinstance(value, list):
            raise self.fail(key, value, "a list")
        return value

    def texts(self, key: str, value: Any) -> tuple[str, ...]:
        return tuple(self.text(f"{key}[{i}]", one) for i, one in enumerate(self.items(key, value)))

    def tokens(self, key: str, value: Any) -> tuple[int, ...]:
        for i, one in enumerate(self.items(key, value)):
            if not isinstance(one, int) or isinstance(one, bool) or not 0 <= one < 1 << 31:
                raise self.fail(f"{key}[{i}]", one, "a token id")
        return tuple(value)

    def by_role(self, key: str, value: Any) -> dict[str, str]:
        if not isinstance(value, dict):
            raise self.fail(key, value, "an object of strings by role")
        for role, one in value.items():
            if role not in _ROLES:
                raise self.error(f"{self.where}: {key} has the role {role!r:.40}, expected {', '.join(_ROLES)}")
            self.text(f"{key}.{role}", one)
        return dict(value)

    def history(self, key: str, value: Any) -> tuple[Message, ...]:
        found = []
        for i, one in enumerate(self.items(key, value)):
            pair = self.texts(f"{key}[{i}]", one)
            if len(pair) != 2:
                raise self.fail(f"{key}[{i}]", one, "[role, text]")
            found.append((pair[0], pair[1]))
        return tuple(found)
