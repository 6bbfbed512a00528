"""Chat templates from strangers: where they are found, and what they cannot do."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from awq_compile.chat import render as module
from awq_compile.chat.conv_template import Message
from awq_compile.chat.render import JinjaTemplate, Refused, read_jinja_template, render
from awq_compile.errors import ModelError

HELLO: list[Message] = [("user", "hello")]


def made(text: str, **variables: str) -> str | Refused:
    return render(JinjaTemplate(text, variables, "here"), [HELLO])[0]


def test_rendering() -> None:
    """What chat templates use is there, and white space is as transformers has it."""
    text = "{%- for m in messages %}\n  {% generation %}\n{{ bos_token }}{{ m | tojson }}{% endgeneration %}\n\n"
    text += "  {%- break %}\n{%- endfor %}{{ add_generation_prompt }}{{ tools is none }}"
    assert made(text, bos_token="<s>") == '<s>{"role": "user", "content": "hello"}TrueTrue'
    assert made("{{ raise_exception('no ' + messages[0].content) }}") == Refused("no hello")
    assert made("{{ strftime_now is defined }}") == "False"
    assert render(JinjaTemplate("{{ strftime_now('%Y') }}", {}, "here"), [HELLO], today="now") == ["now"]


@pytest.mark.parametrize(
    "text",
    [
        "{{ ''.__class__.__base__.__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ cycler.__init__.__globals__.os.system('touch here') }}",
        "{{ self.__init__.__globals__ }}",
        "{% import 'os' as os %}{{ os }}",
        "{{ range(1000000000) | list }}",
    ],
)
def test_the_sandbox(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither Python's insides nor files are reached, and nothing is changed."""
    monkeypatch.chdir(tmp_path)
    found = made(text)
    assert isinstance(found, Refused) or found in ("", "None")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "text",
    [
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{% set ns = namespace(t='x' * 1000000) %}{% for a in range(99999) %}{% set ns.t = ns.t + ns.t %}{% endfor %}",
    ],
)
def test_time_and_memory_are_bounded(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A template that does not end, or fills the memory, is stopped."""
    monkeypatch.setattr(module, "_SECONDS", 1)
    started = time.monotonic()
    with pytest.raises(ModelError, match="here was stopped") as caught:
        made(text)
    assert time.monotonic() - started < 15
    assert caught.value.hint is not None and "--conv-template" in caught.value.hint


def test_length_is_bounded() -> None:
    """A prompt of three megabytes is no prompt."""
    found = made("{{ 'x' * 3000000 }}")
    assert isinstance(found, Refused) and "3000000 characters" in found.reason


def test_a_module_of_the_working_directory_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A jinja2.py in the model's folder is not imported."""
    (tmp_path / "jinja2.py").write_text("raise SystemExit('run')")
    (tmp_path / "json.py").write_text("raise SystemExit('run')")
    monkeypatch.chdir(tmp_path)
    assert made("x") == "x"


def config(folder: Path, **data: Any) -> Path:
    (folder / "tokenizer_config.json").write_text(json.dumps(data))
    return folder


def test_where_templates_are_found(tmp_path: Path) -> None:
    """The file goes before the configuration, in which a list is by name; special tokens are texts or objects."""
    assert read_jinja_template(tmp_path) is None
    several = [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]
    config(
        tmp_path, chat_template=several, bos_token={"content": "<s>", "lstrip": False}, eos_token="</s>", unk_token=None
    )
    found = read_jinja_template(tmp_path)
    assert found is not None and found.text == "d"
    assert found.variables == {"bos_token": "<s>", "eos_token": "</s>"}
    (tmp_path / "chat_template.jinja").write_text("own")
    found = read_jinja_template(tmp_path)
    assert found is not None and (found.text, found.where) == ("own", str(tmp_path / "chat_template.jinja"))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"chat_template": 5}, "chat_template is 5"),
        ({"chat_template": [{"name": "rag", "template": "x"}]}, r"has \['rag'\], and none is called 'default'"),
        ({"chat_template": "x" * (2 << 20)}, "expected a template of up to 1 MiB"),
        ({"chat_template": "\ud800"}, "chat_template holds half of a surrogate pair"),
        ({"chat_template": "x", "bos_token": 5}, "bos_token is 5, expected a token's text"),
    ],
)
def test_unusable_files(tmp_path: Path, data: dict[str, Any], message: str) -> None:
    """The file, the key and the value are named."""
    with pytest.raises(ModelError, match=message) as caught:
        read_jinja_template(config(tmp_path, **data))
    assert "tokenizer_config.json" in str(caught.value)
    (tmp_path / "tokenizer_config.json").unlink()
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff\xfe")
    with pytest.raises(ModelError, match=r"chat_template\.jinja cannot be read"):
        read_jinja_template(tmp_path)
