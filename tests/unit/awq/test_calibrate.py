"""Calibration text and its windows."""

from __future__ import annotations

import builtins
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers_quant import make_model, write_text

from awq_compile.awq.calibrate import CalibrationSpec, bundled_text, calibration_tokens, read_text
from awq_compile.errors import AwqCompileError, CalibrationError, EnvironmentMissingError, ModelError, UsageError
from awq_compile.models.config import ModelConfig, read_config


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def config(model: Path) -> ModelConfig:
    return read_config(model)


def test_windows_come_from_the_text_in_order_without_overlap(model: Path, config: ModelConfig, tmp_path: Path) -> None:
    """Each window is a run of the text; windows differ; the seed chooses them and the same seed the same ones."""
    text = write_text(tmp_path / "t.txt", 333, 2000)
    ids = np.array([int(word[1:]) for word in text.read_text().split()])
    tokens, digest = calibration_tokens(CalibrationSpec(str(text), 10, 50), model, config)
    assert tokens.shape == (10, 50)
    pieces = ids.reshape(-1, 50).tolist()
    places = [pieces.index(window) for window in tokens.tolist()]
    assert places == sorted(set(places))
    again, other = (calibration_tokens(CalibrationSpec(str(text), 10, 50, seed), model, config)[0] for seed in (0, 1))
    assert np.array_equal(tokens, again) and not np.array_equal(tokens, other)
    assert len(digest) == 64


def test_json_lines_are_joined(model: Path, config: ModelConfig, tmp_path: Path) -> None:
    """Lines with the key "text" give the same tokens as their plain text."""
    words = write_text(tmp_path / "t.txt", 333, 400).read_text().split()
    lines = [json.dumps({"text": " ".join(words[i : i + 40]), "id": i}) for i in range(0, 400, 40)]
    (tmp_path / "t.jsonl").write_text("\n".join(lines) + "\n\n")
    plain, _ = calibration_tokens(CalibrationSpec(str(tmp_path / "t.txt"), 4, 50), model, config)
    joined, _ = calibration_tokens(CalibrationSpec(str(tmp_path / "t.jsonl"), 4, 50), model, config)
    assert np.array_equal(plain, joined)


def test_the_bundled_text_is_enough_for_the_default() -> None:
    """The default of 64 x 512 tokens works on the demo model without any option."""
    demo = bundled_text().parent
    tokens, _ = calibration_tokens(CalibrationSpec(), demo, read_config(demo))
    assert tokens.shape == (64, 512)


def test_a_begin_token_of_the_tokenizer_starts_every_window(model: Path, config: ModelConfig, tmp_path: Path) -> None:
    """Models that always see a begin token are calibrated with one."""
    from tokenizers import Tokenizer, processors

    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((model / name).read_bytes())
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    tokenizer.post_processor = processors.TemplateProcessing(single="w7 $A", special_tokens=[("w7", 7)])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    text = write_text(tmp_path / "t.txt", 333, 500)
    tokens, _ = calibration_tokens(CalibrationSpec(str(text), 5, 50), tmp_path, config)
    assert tokens.shape == (5, 50) and (tokens[:, 0] == 7).all()


@pytest.mark.parametrize(
    ("content", "error", "says"),
    [
        ("", CalibrationError, r"t\.txt is empty, and 4 windows of 50"),
        (" \n\n ", CalibrationError, "is empty"),
        ("w1 " * 199, CalibrationError, r"has 199 tokens, and 4 windows of 50 need 200"),
        (b"\xff\xfe\x00", CalibrationError, "is not UTF-8"),
        (None, CalibrationError, r"absent\.txt cannot be read"),
    ],
)
def test_unusable_texts_are_refused(
    content: str | bytes | None,
    error: type[AwqCompileError],
    says: str,
    model: Path,
    config: ModelConfig,
    tmp_path: Path,
) -> None:
    """Empty, too short (both numbers), binary and missing texts: one clear error each."""
    path = tmp_path / ("absent.txt" if content is None else "t.txt")
    if content is not None:
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(error, match=says):
        calibration_tokens(CalibrationSpec(str(path), 4, 50), model, config)


@pytest.mark.parametrize("line", ["{", "[1]", '{"text": 3}', '{"other": "x"}'])
def test_bad_json_lines_name_the_line(line: str, tmp_path: Path) -> None:
    """The file and the line number are in the message."""
    path = tmp_path / "t.jsonl"
    path.write_text('{"text": "fine"}\n' + line + "\n")
    with pytest.raises(CalibrationError, match=r"t\.jsonl, line 2"):
        read_text(path)


def test_a_missing_datasets_package_is_an_environment_error(
    model: Path, config: ModelConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """datasets:NAME without the package says what to install."""
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "datasets":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(EnvironmentMissingError, match="needs the package datasets"):
        calibration_tokens(CalibrationSpec("datasets:wikitext,wikitext-2-raw-v1", 4, 50), model, config)


def test_a_missing_or_broken_tokenizer_is_a_model_error(model: Path, config: ModelConfig, tmp_path: Path) -> None:
    """No tokenizer file, and one that is no tokenizer."""
    text = write_text(tmp_path / "t.txt", 333, 500)
    with pytest.raises(ModelError, match="holds no tokenizer"):
        calibration_tokens(CalibrationSpec(str(text), 4, 50), tmp_path, config)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ModelError, match="is not a tokenizer"):
        calibration_tokens(CalibrationSpec(str(text), 4, 50), tmp_path, config)


def test_windows_longer_than_the_context_and_foreign_vocabularies_are_refused(
    model: Path, config: ModelConfig, tmp_path: Path
) -> None:
    """Length above the context; a token id that the embedding does not have."""
    from dataclasses import replace

    text = write_text(tmp_path / "t.txt", 333, 2000)
    with pytest.raises(CalibrationError, match="windows of 257 tokens exceed the model's context of 256"):
        calibration_tokens(CalibrationSpec(str(text), 4, 257), model, config)
    with pytest.raises(ModelError, match="vocab_size is 100"):
        calibration_tokens(CalibrationSpec(str(text), 4, 50), model, replace(config, vocab_size=100))


@pytest.mark.parametrize(("samples", "length"), [(0, 512), (64, 1), (1 << 20, 512), (64, 1 << 20)])
def test_absurd_numbers_are_usage_errors(samples: int, length: int) -> None:
    """Samples and length have bounds."""
    with pytest.raises(UsageError):
        CalibrationSpec(samples=samples, length=length)
