"""JSON from a stranger: whatever is wrong with it is one error, in every reader."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from awq_compile.awq.calibrate import read_text
from awq_compile.chat.config import tokenizer_info
from awq_compile.errors import AwqCompileError, ModelError
from awq_compile.json_input import parse_json, read_object
from awq_compile.manifest import json_object
from awq_compile.models.config import JsonFile
from awq_compile.models.weights import read_header
from awq_compile.tuning.bundle import read_results
from awq_compile.tuning.record import parse_record

HOSTILE = {
    "5000 digits": ("1" * 5000, "an integer of 5000 digits"),
    "400 digits": ("1" + "0" * 400, "an integer of 401 digits"),
    "NaN": ("NaN", "is NaN, expected a finite"),
    "infinite": ("-Infinity", "is -Infinity, expected a finite"),
    "overflow": ("1e999", "is 1e999, expected a finite"),
    "nested": ("[" * 100_000 + "]" * 100_000, "nested too deeply"),
    "surrogate": (r'"\ud800"', "half of a surrogate pair"),
    "surrogate in a key": (r'{"\uDFFF": 1}', "half of a surrogate pair"),
    "cut": ("{", "Expecting"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_what_is_wrong_is_a_value_error(name: str) -> None:
    """With the reason, wherever in the text it is."""
    text, reason = HOSTILE[name]
    with pytest.raises(ValueError, match=reason):
        parse_json(f'{{"a": [1, {text}]}}')


@pytest.mark.parametrize(
    ("text", "where"),
    [
        ('{"a": {"b": [1, {"c": NaN}]}, "d": 1e999}', r"a\.b\[1\]\.c is NaN"),
        (r'{"a": "\ud83d\ude00", "b": "\ude00"}', "b holds half"),
        (r'{"\ud800": 1}', "a key holds half"),
        ("Infinity", "the value is Infinity"),
    ],
)
def test_the_key_is_named(text: str, where: str) -> None:
    """As a path through objects and arrays."""
    with pytest.raises(ValueError, match=where):
        parse_json(text)


def test_what_is_right_is_read_as_it_is() -> None:
    """Large sizes as tokenizers write them, whole surrogate pairs, and backslashes before a u."""
    text = r'{"a": [1000000000000000019884624838656, -1.5e3, "\ud83d\ude00", "\\ud800", null]}'
    assert parse_json(text) == json.loads(text)


def safetensors(path: Path) -> Any:
    """Reads a file as the header of weights."""
    data = path.read_bytes()
    path.write_bytes(struct.pack("<Q", len(data)) + data)
    return read_header(path)


READERS: dict[str, Callable[[Path], Any]] = {
    "model": JsonFile,
    "dist": json_object,
    "tokenizer.json": tokenizer_info,
    "weights": safetensors,
    "text": read_text,
    "record": lambda path: parse_record(path.read_text()),
    "results": read_results,
}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("name", HOSTILE)
def test_every_reader_gives_one_clear_error(tmp_path: Path, reader: str, name: str) -> None:
    """Of our own kinds, with the reason."""
    text, reason = HOSTILE[name]
    (tmp_path / "x.jsonl").write_text(f'{{"a": {text}}}')
    with pytest.raises(AwqCompileError, match=reason):
        READERS[reader](tmp_path / "x.jsonl")


def test_what_is_no_regular_file_is_not_opened(tmp_path: Path) -> None:
    """Reading a pipe that nobody writes to would never end."""
    os.mkfifo(tmp_path / "config.json")
    for path in (tmp_path / "config.json", tmp_path):
        with pytest.raises(ModelError, match=f"{path} is not a file"):
            read_object(path, ModelError, 1000)
