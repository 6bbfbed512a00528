"""MLC's form: its prompt rules, and how a file from outside is read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from helpers_chat import cpp_prompt, family, write_chat_model

from awq_compile.chat.config import chat_config, generation_defaults, tokenizer_info
from awq_compile.chat.conv_template import ConvTemplate
from awq_compile.chat.select import select_template
from awq_compile.errors import ArtifactError, ModelError, UsageError
from awq_compile.formats import QuantScheme
from awq_compile.limits import CompileOptions
from awq_compile.models.config import read_config

MINIMAL: dict[str, Any] = {"roles": {"user": "U:", "assistant": "A:"}, "seps": ["|"]}


def read(**changed: Any) -> ConvTemplate:
    return ConvTemplate.from_json(MINIMAL | changed, "some.json", UsageError)


def test_prompts() -> None:
    """System text, roles, separators and the open end, as MLC writes them."""
    template = read(
        role_content_sep=" ", role_empty_sep="", system_template="<{system_message}>", system_message="be kind"
    )
    assert template.prompt([("user", "a")]) == "<be kind>U: a|A:"
    assert template.prompt([("system", ""), ("user", "a"), ("assistant", ""), ("user", "b")]) == "<>U: a|A: |U: b|A:"
    inst = read(seps=["|", "$"], add_role_after_system_message=False)
    assert inst.prompt([("system", "s"), ("user", "a"), ("assistant", "b"), ("user", "c")]) == "sa|A:b$U:c|A:"
    assert inst.prompt([("user", "a")]) == "U:a|A:"  # no system text, so the role is there
    with pytest.raises(UsageError, match="no role 'tool', only user, assistant"):
        inst.prompt([("tool", "x")])


def test_reasoning_goes_from_earlier_turns_alone() -> None:
    """What stands behind the last user message is an answer that is gone on with."""
    template = read(strip_reasoning_in_history=True)
    said = [("user", "a"), ("assistant", "<think>x</think>\n\nb")]
    assert template.prompt(said) == "U:a|A:<think>x</think>\n\nb|A:" == cpp_prompt(template.to_json(), said)
    assert template.prompt([*said, ("user", "c")]) == "U:a|A:b|U:c|A:"


def test_contents_are_never_templates() -> None:
    """A message that holds placeholders, of its own role too, arrives as it is."""
    template = read(role_templates={"user": "<{user_message}>"})
    for text in ("{user_message}", "{system_message}{assistant_message}", "{user_message}{user_message}"):
        assert template.prompt([("user", text)]) == f"U:<{text}>|A:" == cpp_prompt(template.to_json(), [("user", text)])


def test_what_is_written_reads_back() -> None:
    """to_json and from_json are inverse; a prefix of no tokens is left out, for MLC would put an empty piece first."""
    template = read(
        system_prefix_token_ids=[3, 4], messages=[["user", "a"], ["assistant", "b"]], name="x", stop_str=["s"]
    )
    assert ConvTemplate.from_json(json.loads(json.dumps(template.to_json())), "", ArtifactError) == template
    assert template.prompt([("user", "c")]) == "U:a|A:b|U:c|A:"
    assert "system_prefix_token_ids" not in read().to_json()
    assert read(system_prefix_token_ids=None, name=None) == read()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"seps": "x"}, "some.json: seps is 'x', expected a list"),
        ({"seps": []}, r"seps is \[\], expected one separator, or two"),
        ({"seps": ["a", 5]}, r"seps\[1\] is 5, expected a string"),
        ({"roles": {"user": "U"}}, "roles has no 'assistant'"),
        ({"roles": ["user"]}, "expected an object of strings by role"),
        (
            {"roles": {"user": "", "assistant": "", "wizard": ""}},
            "roles has the role 'wizard', expected user, assistant, tool",
        ),
        ({"roles": {"user": "", "assistant": None}}, "roles.assistant is None, expected a string"),
        (
            {"role_templates": {"user": "no placeholder"}},
            "role_templates.user is .*expected {user_message} in it, once",
        ),
        ({"system_template": "{system_message}{system_message}"}, "expected {system_message} at most once"),
        ({"add_role_after_system_message": 1}, "add_role_after_system_message is 1, expected true or false"),
        ({"stop_token_ids": [True]}, r"stop_token_ids\[0\] is True, expected a token id"),
        ({"stop_token_ids": [-1]}, r"stop_token_ids\[0\] is -1"),
        ({"messages": [["user"]]}, r"messages\[0\] is \['user'\], expected \[role, text\]"),
        ({"messages": [["system", "x"]]}, "messages has the role 'system', and roles has not"),
        ({"role_empty_sep": "\ud800"}, "role_empty_sep is .*, expected Unicode text"),
        ({"stop_strs": []}, "unknown key 'stop_strs'"),
    ],
)
def test_every_wrong_key_is_named(changed: dict[str, Any], message: str) -> None:
    """File, key, value and what is expected there."""
    with pytest.raises(UsageError, match=message) as caught:
        read(**changed)
    assert str(caught.value).startswith("some.json: ")


def test_hints_and_missing_keys() -> None:
    """A mistyped key names its neighbour."""
    with pytest.raises(UsageError) as caught:
        read(stop_strs=[])
    assert caught.value.hint == "did you mean stop_str?"
    for data, message in (({"seps": [""]}, "key 'roles' is missing"), ([], "expected a JSON object")):
        with pytest.raises(UsageError, match=message):
            ConvTemplate.from_json(data, "some.json", UsageError)


def test_a_file_overrides_the_models_template(tmp_path: Path) -> None:
    """In MLC's form, alone or within an mlc-chat-config.json; stop tokens are the model's where it names none."""
    folder = family(tmp_path / "m", "qwen2")
    config = read_config(folder)
    file = tmp_path / "own.json"
    file.write_text(json.dumps(MINIMAL))
    found = select_template(folder, config, str(file))
    assert found.notes == () and found.template.seps == ("|",)
    assert found.template.stop_token_ids == config.eos_token_ids == (4096,)
    file.write_text(json.dumps({"vocab_size": 1, "conv_template": MINIMAL | {"stop_token_ids": [7]}}))
    assert select_template(folder, config, str(file)).template.stop_token_ids == (7,)
    for data, message in (
        (MINIMAL | {"stop_token_ids": [99999]}, "stop_token_ids: 99999 is outside the vocabulary of 4099"),
        (MINIMAL | {"sep": ""}, "unknown key 'sep'"),
        ([], "expected a JSON object"),
    ):
        file.write_text(json.dumps(data))
        with pytest.raises(UsageError, match=message):
            select_template(folder, config, str(file))
    with pytest.raises(UsageError, match=r"none\.json does not exist"):
        select_template(folder, config, str(tmp_path / "none.json"))


def test_plain(tmp_path: Path) -> None:
    """On request, or for a model without a chat template, which is said: the prompt as it is, after the begin token."""
    bare = write_chat_model(tmp_path / "bare", None, ("", "</s>"))
    found = select_template(bare, read_config(bare))
    assert len(found.notes) == 1 and "has no chat template" in found.notes[0]
    assert found.template.prompt([("user", "Once ")]) == "Once "
    assert found.template.system_prefix_token_ids == (0,)  # the demo's tokenizer writes one before a text
    chat = family(tmp_path / "chat", "qwen2")
    asked = select_template(chat, read_config(chat), "plain")
    assert asked.notes == () and asked.template.name == "plain"


def made(folder: Path) -> dict[str, Any]:
    """mlc-chat-config.json of a model."""
    config = read_config(folder)
    text = chat_config(
        config,
        QuantScheme.parse("w4g128"),
        CompileOptions(context_window_size=128, prefill_chunk_size=64, max_batch_size=4),
        select_template(folder, config).template,
        tokenizer_dir=folder,
        tokenizer_files=["tokenizer.json"],
    )
    data: dict[str, Any] = json.loads(text)
    return data


def test_chat_config(tmp_path: Path) -> None:
    """Defaults of requests are the model's, else MLC's; a number is written as a float, which MLC's reader wants."""
    folder = family(tmp_path / "m", "qwen2")
    data = made(folder)
    assert data["conv_template"]["roles"]["user"] == "<|im_start|>user"
    assert (data["temperature"], data["top_p"], data["repetition_penalty"]) == (1.0, 1.0, 1.0)
    assert (data["pad_token_id"], data["bos_token_id"], data["eos_token_id"]) == (0, None, [4096])
    assert (data["active_vocab_size"], data["vocab_size"], data["model_task"]) == (4099, 4099, "chat")
    (folder / "generation_config.json").write_text('{"temperature": 1, "top_p": 0.8, "pad_token_id": 3}')
    data = made(folder)
    assert (data["temperature"], data["top_p"], data["pad_token_id"]) == (1.0, 0.8, 3)
    assert isinstance(data["temperature"], float)
    for text, message in (('{"top_p": 2}', "top_p is 2.0, expected 0.0 to 1.0"), ('{"top_p": NaN}', "top_p is NaN")):
        (folder / "generation_config.json").write_text(text)
        with pytest.raises(ModelError, match=message):
            generation_defaults(folder)


BYTE_LEVEL: dict[str, Any] = {"type": "ByteLevel", "add_prefix_space": True}
STRIP = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
PREPEND = {"type": "Prepend", "prepend": "▁"}


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        ({"decoder": BYTE_LEVEL, "normalizer": None}, ("byte_level", False, False)),
        (
            {
                "decoder": {"type": "Sequence", "decoders": [{"type": "Replace"}, {"type": "ByteFallback"}, STRIP]},
                "normalizer": {"type": "Sequence", "normalizers": [PREPEND, {"type": "Replace"}]},
            },
            ("byte_fallback", True, True),
        ),
        ({"decoder": {"type": "Metaspace"}, "normalizer": PREPEND}, ("byte_fallback", True, False)),
        ({"decoder": STRIP | {"stop": 1}, "normalizer": PREPEND | {"prepend": "_"}}, ("byte_fallback", False, False)),
        ({}, ("byte_fallback", False, False)),
    ],
)
def test_tokenizer_info(tmp_path: Path, data: Any, expected: tuple[str, bool, bool]) -> None:
    """Found by MLC's rules: the decoder's kind, a space put before a text, a space taken off."""
    (tmp_path / "tokenizer.json").write_text(json.dumps(data))
    assert tuple(tokenizer_info(tmp_path / "tokenizer.json").values()) == expected
