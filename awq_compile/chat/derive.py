"""MLC's form of a model's own chat template, found by rendering it and held against it.

Marked messages go through the Jinja template; what stands between the marks is cut into MLC's fields in a few ways, and
the first way that gives the same text, and the same tokens, for every probe is taken. A probe is a conversation of one
to three turns, with and without a system message.

MLC's form cannot say everything. Four differences are accepted, each with a note for the user:

- MLC always writes the system text. Where the model writes none without a system message, a default one is named.
- It has no place for a system message within a later turn (or a template refuses it): it goes to the front, as it is.
- It does not trim messages, nor today's date: the date that the template itself falls back to is kept.
- Earlier answers' reasoning is dropped whole, or not at all.

Anything else is refused, with the first conversation that differs.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

from awq_compile.chat.conv_template import SYSTEM, ConvTemplate, Message, placeholder
from awq_compile.chat.render import JinjaTemplate, Refused, render
from awq_compile.errors import ModelError

OVERRIDE: Final = (
    "--conv-template FILE gives it in MLC's form (conv_template of an mlc-chat-config.json); plain for none"
)
DEFAULT_SYSTEM: Final = "You are a helpful assistant."

_TODAY: Final = "Zq0today"
_MARKS: Final = {"system": "Zq0system", "user": "Zq0user", "assistant": "Zq0answer"}
_SAID: Final = (
    ("Hello", "Good day."),
    ("Grüße, 你好 🙂", ""),
    ("two\n\nlines  with  gaps", "first\nsecond {braces} <b>&amp;</b>"),
)
_SYSTEM_TEXT: Final = "Be brief.\n\nÜbe Höflichkeit."
_REASONING: Final = "<think>\nA thought.\n</think>\n\nAn answer."
_PADDED: Final = " \n padded \n "
_AROUND: Final = re.compile(r"\s*\bpadded\b\s*")


@dataclass(frozen=True)
class Derived:
    """A template in MLC's form, and in what it differs from the model's own, in sentences."""

    template: ConvTemplate
    notes: tuple[str, ...]


class Vocabulary:
    """What is asked of a tokenizer (the `tokenizers` package's)."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self.added = [one.content for one in tokenizer.get_added_tokens_decoder().values() if one.content]

    def encode(self, text: str) -> list[int]:
        """Token ids of a text alone, as MLC's engines make them."""
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def token_id(self, token: str) -> int | None:
        """The id of a token's text; None when there is no such token."""
        found = self._tokenizer.token_to_id(token)
        return found if isinstance(found, int) else None

    def first_added(self, text: str) -> str:
        """The added token (special ones are) that comes first in `text`; empty when there is none."""
        found = [token for token in self.added if token in text]
        return min(found, key=lambda token: (text.index(token), -len(token)), default="")

    def common_end(self, one: str, other: str) -> int:
        """Length of a common ending of added tokens and white space."""
        length = 0
        while length < min(len(one), len(other)):
            rest = one[: len(one) - length]
            tokens = [token for token in self.added if rest.endswith(token)]
            step = max(map(len, tokens), default=1 if rest[-1].isspace() else 0)
            if not step or not other[: len(other) - length].endswith(rest[-step:]):
                break
            length += step
        return length


def derive(source: JinjaTemplate, vocabulary: Vocabulary, name: str) -> Derived:
    """MLC's form of `source`. Raises `ModelError` where it has none, naming the option that overrides it."""
    return _Derivation(source, vocabulary, name).run()


def _conversation(turns: int, *, system: str | None = None) -> list[Message]:
    """`turns` messages of the user's and the answers between them."""
    made: list[Message] = [] if system is None else [("system", system)]
    for user, answer in _SAID[:turns]:
        made += [("user", user), ("assistant", answer)]
    return made[:-1]


def _marked(turns: int, *, system: bool) -> list[Message]:
    made: list[Message] = [("system", _MARKS["system"])] if system else []
    for turn in range(turns):
        made += [("user", f"{_MARKS['user']}{turn}q"), ("assistant", f"{_MARKS['assistant']}{turn}q")]
    return made[:-1]


def _pieces(text: str | Refused, messages: Sequence[Message]) -> list[str] | None:
    """What stands before, between and behind the messages; None when one is not there once, and in its order."""
    if isinstance(text, Refused):
        return None
    found = []
    for _, mark in messages:
        before, _, text = text.partition(mark) if text.count(mark) == 1 else ("", "", "")
        if not text:
            return None
        found.append(before)
    return [*found, text]


@dataclass(frozen=True)
class _Parts:
    """The model's form: first + user + user_assistant + answer + assistant_user + … + user + last.

    `before_system` and `after_system` (before the first user's message) are None where a system message has no place.
    """

    first: str
    user_assistant: str
    assistant_user: str
    last: str
    before_system: str | None
    after_system: str | None

    def without(self, begin: str) -> _Parts:
        """The same without `begin` at the start of every prompt."""
        before = self.before_system
        return replace(
            self,
            first=self.first.removeprefix(begin),
            before_system=before.removeprefix(begin) if before is not None else None,
        )


class _Derivation:
    """One run of `derive`: the model's prompts of all probes, rendered at once."""

    def __init__(self, source: JinjaTemplate, vocabulary: Vocabulary, name: str) -> None:
        self.source, self.vocabulary, self.name = source, vocabulary, name
        self.plain = [_conversation(turns) for turns in (1, 2, 3)]
        self.with_system = [_conversation(turns, system=_SYSTEM_TEXT) for turns in (1, 2, 3)]
        self.reasoning = {
            system: [*before, ("user", "Why?"), ("assistant", _REASONING), ("user", "And?")]
            for system, before in ((False, []), (True, [("system", _SYSTEM_TEXT)]))
        }
        self.marked = [_marked(1, system=False), _marked(3, system=False), _marked(1, system=True)]
        asked = [*self.marked, *self.plain, *self.with_system, *self.reasoning.values(), *self._padded_all()]
        self.rendered = dict(zip(map(tuple, asked), render(source, asked), strict=True))

    def _padded_all(self) -> list[list[Message]]:
        return [self._padded(role, system) for system in (False, True) for role in ("system", "user", "assistant")]

    def _padded(self, role: str, system: bool) -> list[Message]:
        """A conversation in which `role`'s messages have white space around them."""
        base = _conversation(2, system=_SYSTEM_TEXT if system else None)
        return [(who, _PADDED if who == role else text) for who, text in base]

    def expected(self, messages: Sequence[Message]) -> str | Refused:
        """The model's own prompt."""
        return self.rendered[tuple(messages)]

    def run(self) -> Derived:
        parts = self._parts()
        notes = []
        template = self._first(parts, system=True) if parts.before_system is not None else None
        system = template is not None
        if template is not None:
            template, note = self._default_system(template, parts)
            notes += note
        else:
            template = self._first(parts, system=False)
            if template is None:
                raise self._differs(parts)
            notes += self._system_notes(template, parts)
        template, note = self._with_reasoning(template, system)
        notes += [*note, *self._trim_notes(template, system), *self._date_notes()]
        token = self._turn_end(parts)
        ids = self.vocabulary.token_id(token)
        template = replace(template, stop_str=(token,) if token else (), stop_token_ids=() if ids is None else (ids,))
        return Derived(template, tuple(notes))

    def _parts(self) -> _Parts:
        one, three, system = (_pieces(self.expected(messages), messages) for messages in self.marked)
        if one is None or three is None:
            raise self._unusable()
        parts = _Parts(three[0], three[1], three[2], three[-1], None, None)  # later turns are the probes' to compare
        if system is None or system[-1] != parts.last:
            return parts
        return replace(parts, before_system=system[0], after_system=system[1])

    def _unusable(self) -> ModelError:
        """A template that does not render the simplest conversations."""
        for messages in self.marked[:2]:
            text = self.expected(messages)
            if isinstance(text, Refused):
                if "strftime_now" in self.source.text and not isinstance(self._dated(), Refused):
                    return self._refuse("it writes today's date, and holds no other one to fall back to")
                return self._refuse(f"it refuses a plain conversation: {text.reason}")
        return self._refuse("it does not show every message once and as it is")

    def _refuse(self, why: str) -> ModelError:
        return ModelError(f"{self.source.where} has no equal in MLC's form: {why:.600}", hint=OVERRIDE)

    def _differs(self, parts: _Parts) -> ModelError:
        """Shows the first conversation that no way of cutting gets right."""
        for template in self._ways(parts, system=False):
            for messages in self.plain:
                expected, found = self.expected(messages), template.prompt(messages)
                if expected != found:
                    shown = expected.reason if isinstance(expected, Refused) else expected
                    return self._refuse(f"of {len(messages)} messages it makes {shown!r:.250}, MLC {found!r:.250}")
        return self._refuse(f"the first user message follows {parts.first!r}, later ones {parts.assistant_user!r}")

    def _first(self, parts: _Parts, *, system: bool) -> ConvTemplate | None:
        """The first way that gives the model's own prompts."""
        probes = self.with_system if system else self.plain
        return next((one for one in self._ways(parts, system=system) if self._equal(one, probes)), None)

    def _equal(self, template: ConvTemplate, probes: Sequence[Sequence[Message]]) -> bool:
        return all(self._same(template, messages, self.expected(messages)) for messages in probes)

    def _same(self, template: ConvTemplate, messages: Sequence[Message], expected: str | Refused) -> bool:
        """Same text, and same tokens where the begin token is one that is put before the text."""
        found = template.prompt(messages)
        begin = self._begin(template)
        if isinstance(expected, Refused) or begin + found != expected:
            return False
        ids = [*template.system_prefix_token_ids, *self.vocabulary.encode(found)]
        return not begin or ids == self.vocabulary.encode(expected)

    def _begin(self, template: ConvTemplate) -> str:
        """The begin token's text, where MLC's form holds it as a token."""
        return self.source.variables.get("bos_token", "") if template.system_prefix_token_ids else ""

    def _ways(self, parts: _Parts, *, system: bool) -> Iterator[ConvTemplate]:
        """Ways to cut the model's form into MLC's fields, the most usual first."""
        begin = self.source.variables.get("bos_token", "")
        token = self.vocabulary.token_id(begin)
        start = parts.before_system if system else parts.first
        begins = [((token,), parts.without(begin))] if token is not None and (start or "").startswith(begin) else []
        for prefix, rest in (*begins, ((), parts)):
            for cut in self._cuts(rest):
                assistant_end, user = rest.assistant_user[:cut], rest.assistant_user[cut:]
                turns = self._turns(rest, user, assistant_end)
                for fields in self._system_fields(rest, user, system=system):
                    yield ConvTemplate(name=self.name, system_prefix_token_ids=prefix, **turns, **fields)

    def _cuts(self, parts: _Parts) -> list[int]:
        """Where an answer's end may give way to the next user's role: behind its end token, or where prompts begin."""
        text = parts.assistant_user
        token = self.vocabulary.first_added(text)
        behind = text.index(token) + len(token)
        blank = len(text) - len(text[behind:].lstrip())
        start = len(text) - _common(text[::-1], parts.first[::-1])
        return list(dict.fromkeys((blank, behind, start, 0)))

    def _system_fields(self, parts: _Parts, user: str, *, system: bool) -> Iterator[dict[str, Any]]:
        if not system:
            if parts.first.endswith(user):
                yield {"system_template": parts.first.removesuffix(user) + (SYSTEM if self._shown() else "")}
            return
        before, after = f"{parts.before_system}{SYSTEM}", parts.after_system or ""
        if after.endswith(user):
            yield {"system_template": before + after.removesuffix(user)}
        yield {"system_template": before + after, "add_role_after_system_message": False}

    def _shown(self) -> bool:
        """Whether a system message is anything but dropped without a word."""
        text = self.expected(self.with_system[0])
        return isinstance(text, Refused) or _SYSTEM_TEXT in text

    def _turns(self, parts: _Parts, user: str, assistant_end: str) -> dict[str, Any]:
        """Roles and separators: what the user's and the assistant's beginnings end in alike stands once."""
        both, last = parts.user_assistant, parts.last
        user_end = assistant_end if both.startswith(assistant_end) and last.startswith(assistant_end) else ""
        assistant, empty = both.removeprefix(user_end), last.removeprefix(user_end)
        templates = {}
        for length in range(self.vocabulary.common_end(user, assistant), -1, -1):
            role = assistant[: len(assistant) - length]
            if empty.startswith(role):
                break
        else:  # what an answer begins with in history is not what it is asked for with
            length = 0
            role = assistant[: _common(assistant, empty)]
            templates = {"assistant": assistant.removeprefix(role) + placeholder("assistant")}
        return {
            "roles": {"user": user[: len(user) - length], "assistant": role},
            "role_templates": ConvTemplate(roles={}, seps=()).role_templates | templates,
            "seps": (assistant_end,) if user_end == assistant_end else (user_end, assistant_end),
            "role_content_sep": user[len(user) - length :],
            "role_empty_sep": empty.removeprefix(role),
        }

    def _default_system(self, template: ConvTemplate, parts: _Parts) -> tuple[ConvTemplate, list[str]]:
        """What stands in the place of a system message when there is none."""
        before, after, first = parts.before_system or "", parts.after_system or "", parts.first
        if first.startswith(before) and first.endswith(after) and len(first) >= len(before) + len(after):
            own = replace(template, system_message=first[len(before) : len(first) - len(after)])
            if self._equal(own, self.plain):
                return own, []
        note = f"without a system message the model's own template writes none, and MLC always one: {DEFAULT_SYSTEM!r}"
        return replace(template, system_message=DEFAULT_SYSTEM), [note]

    def _system_notes(self, template: ConvTemplate, parts: _Parts) -> list[str]:
        if self._equal(template, self.with_system):
            return []
        one = self.expected(self.with_system[0])
        why = f"refuses a system message ({one.reason})" if isinstance(one, Refused) else "writes it within the turns"
        return [f"MLC puts a system message before the first role, as it is, and the model's own template {why}"]

    def _with_reasoning(self, template: ConvTemplate, system: bool) -> tuple[ConvTemplate, list[str]]:
        probe = self.reasoning[system]
        for strip in (False, True):
            own = replace(template, strip_reasoning_in_history=strip)
            if self._equal(own, [probe]):
                return own, []
        text = self.expected(probe)
        drops = isinstance(text, str) and "A thought." not in text
        what = "drops the reasoning of earlier answers" if drops else "rewrites the reasoning of earlier answers"
        note = (
            f"the model's own template {what}, and MLC {'leaves other white space' if drops else 'keeps it as it is'}"
        )
        return replace(template, strip_reasoning_in_history=drops), [note]

    def _trim_notes(self, template: ConvTemplate, system: bool) -> list[str]:
        """Whose messages the model's own template trims; any other change of white space is refused."""
        trimmed = []
        for role in ("system", "user", "assistant") if system else ("user", "assistant"):
            messages = self._padded(role, system)
            if self._equal(template, [messages]):
                continue
            expected = self.expected(messages)
            found = template.prompt(messages)
            if isinstance(expected, Refused) or _AROUND.sub("", expected) != self._begin(template) + _AROUND.sub(
                "", found
            ):
                shown = expected.reason if isinstance(expected, Refused) else expected
                raise self._refuse(f"white space around the {role}'s messages becomes {shown!r}")
            trimmed.append(role)
        who = ", ".join(trimmed)
        return [f"the model's own template trims white space around messages ({who}), MLC does not"] if trimmed else []

    def _dated(self) -> str | Refused:
        return render(self.source, self.marked[:1], today=_TODAY)[0]

    def _date_notes(self) -> list[str]:
        if "strftime_now" not in self.source.text or _TODAY not in str(self._dated()):
            return []
        return ["the model's own template writes today's date; here it is the fixed one that the template holds"]

    def _turn_end(self, parts: _Parts) -> str:
        """What ends an answer: the first special token behind it, else the text there."""
        return self.vocabulary.first_added(parts.assistant_user) or parts.assistant_user.strip()


def _common(one: str, other: str) -> int:
    """Length of the common beginning."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
