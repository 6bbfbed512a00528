"""Renders a chat template, which is a program from a stranger, in a process of its own.

stdin: {"template", "variables", "conversations", "today", "seconds", "bytes"}; stdout: for each conversation
{"text": …} or {"error": …}. The environment is that of transformers: a sandbox that reaches no attribute of Python's
and changes nothing, here under limits of processor time, memory and length as well. Without `today` a template finds
no `strftime_now` and writes the date it holds itself, if any.

Run by path, with only the standard library and Jinja: `render.render` is how to call it.
"""

from __future__ import annotations

import json
import resource
import sys
from contextlib import suppress
from typing import Any, Final

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

_MAX_CHARACTERS: Final = 1 << 20  # of one prompt; the longest that is asked for has some hundred


class Generation(jinja2.ext.Extension):
    """`{% generation %}…{% endgeneration %}`, which marks the assistant's tokens for training: its body."""

    tags = {"generation"}  # noqa: RUF012 (Jinja's interface)

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        """The body, as it is."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _raise(message: str) -> None:
    raise jinja2.TemplateError(str(message))


def _tojson(value: Any, **options: Any) -> str:
    return json.dumps(value, **{"ensure_ascii": False, **options})


def environment(today: str | None) -> ImmutableSandboxedEnvironment:
    """The sandbox, with what chat templates use."""
    extensions: list[Any] = [Generation, jinja2.ext.loopcontrols]
    made = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
    made.filters["tojson"] = _tojson
    made.globals["raise_exception"] = _raise
    if today is not None:
        made.globals["strftime_now"] = lambda _format: today
    return made


def _limit(seconds: int, nbytes: int) -> None:
    for what, most in ((resource.RLIMIT_CPU, seconds), (resource.RLIMIT_AS, nbytes), (resource.RLIMIT_FSIZE, 1 << 26)):
        with suppress(ValueError, OSError):  # macOS limits no address space; the caller's clock remains
            resource.setrlimit(what, (most, most))


def _render(template: jinja2.Template, variables: dict[str, Any], messages: list[Any]) -> dict[str, str]:
    try:
        text = template.render(messages=messages, tools=None, documents=None, add_generation_prompt=True, **variables)
    except MemoryError:
        raise
    except Exception as error:  # a template can fail in any way
        return {"error": f"{error}"[:400] or type(error).__name__}
    if len(text) > _MAX_CHARACTERS:
        return {"error": f"{len(text)} characters came out, and at most {_MAX_CHARACTERS} are taken"}
    return {"text": text}


def main() -> None:
    """One request."""
    request = json.load(sys.stdin)
    _limit(request["seconds"], request["bytes"])
    try:
        template = environment(request["today"]).from_string(request["template"])
        done = [_render(template, request["variables"], messages) for messages in request["conversations"]]
    except (jinja2.TemplateError, RecursionError) as error:
        done = [{"error": f"{error}"[:400]}] * len(request["conversations"])
    json.dump(done, sys.stdout)


if __name__ == "__main__":
    main()
